"""What several test files use."""

import pkgutil

import pytest

# A failed assert in a helper then shows its values.
pytest.register_assert_rewrite(*(f"helpers.{module.name}" for module in pkgutil.iter_modules(__path__)))
