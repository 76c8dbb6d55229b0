"""What several test files use."""

import pytest

pytest.register_assert_rewrite("helpers")  # so that a failed assert in a helper shows its values
