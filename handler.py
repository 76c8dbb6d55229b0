"""What Hugging Face's Inference Endpoints run for a saved DETRIS: a request in, masks as PNG in base64 out.

The service loads this file by its path, out of the model's folder and under a name of its own, in which a relative
import would not work. So nothing of ours is imported here: `transformers.pipeline` finds it.

The service installs what a `requirements.txt` beside the model names. Name `ftfy`, `opencv-python-headless` and `peft`
there, which the service does not promise to have.
"""

import base64
import binascii
import io
import threading
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import pipeline

MAX_IMAGE_BYTES = 20 * 2**20  # of an image file
MAX_PIXELS = 50_000_000
MAX_PHRASES = 100
MAX_PHRASE_LENGTH = 1_000  # characters
PHRASES_AT_ONCE = 8  # so many masks of full size are in memory together
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


class EndpointHandler:
    """
    Answers requests to a model, which come from strangers: they cannot make it read files or addresses, nor fill the
    memory. Requests are answered one after the other.

    Args:
        path (`str`, *optional*): the model's folder or Hub id; by default the folder that this file lies in.
    """

    def __init__(self, path: str = ""):
        model = str(path) or str(Path(__file__).parent)
        # What this trusts is the code beside this file, which runs already.
        self.pipeline = pipeline("referring-image-segmentation", model=model, trust_remote_code=True)
        self.lock = threading.Lock()

    def __call__(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        """
        Segment what phrases name in an image.

        Args:
            data: `{"inputs": image, "parameters": {"text": …, "threshold": …}}`, or `{"inputs": {"image": …, "text":
                …}}` with or without parameters. The image is base64 text, with or without `data:image/…;base64,` in
                front, or a PIL image, which the service makes of a request that is an image itself. `text` is a phrase
                or a list of phrases. `threshold` is a probability.

        Returns:
            A dict for each phrase: `label`, `score` and `box` as the pipeline gives them, and `mask`, a PNG of the
            image's size in base64, 255 inside the mask and 0 outside.

        Raises:
            ValueError: if something in the request is missing, unknown, unreadable or too large.
        """
        request = _fields_of(data, "The request", ("inputs", "parameters"))
        parameters = _fields_of(request.get("parameters") or {}, "parameters", ("text", "threshold"))
        image, text = request.get("inputs"), parameters.get("text")
        if isinstance(image, dict):
            inputs = _fields_of(image, "inputs", ("image", "text"))
            if text is not None and inputs.get("text") is not None:
                raise ValueError("text is given twice, in inputs and in parameters: leave one of them out.")
            image, text = inputs.get("image"), inputs.get("text") if text is None else text
        phrases, threshold = _checked_phrases(text), _as_number(parameters.get("threshold"))
        image = _checked_image(image)
        answer = []
        with self.lock:
            self.pipeline.processor(text=phrases)  # refuses a phrase without words before anything is computed
            for start in range(0, len(phrases), PHRASES_AT_ONCE):
                for result in self.pipeline(image, phrases[start : start + PHRASES_AT_ONCE], threshold=threshold):
                    answer.append({**result, "mask": _as_png(result["mask"])})
        return answer


def _fields_of(values: Any, name: str, known: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f"{name} is of type {type(values).__name__}: give an object with {', '.join(known)}.")
    unknown = [str(key)[:50] for key in values if key not in known]
    if unknown:
        raise ValueError(f"{name} has the unknown fields {unknown[:10]}: it may have {', '.join(known)}.")
    return values


def _checked_phrases(text: Any) -> list[str]:
    if text is None:
        raise ValueError('text is missing: say what to segment, as in "parameters": {"text": "left cat"}.')
    phrases = [text] if isinstance(text, str) else text
    if not isinstance(phrases, list) or not all(isinstance(phrase, str) for phrase in phrases):
        raise ValueError("text is neither a phrase nor a list of phrases: give strings.")
    if not 1 <= len(phrases) <= MAX_PHRASES:
        raise ValueError(f"text holds {len(phrases)} phrases: give 1 to {MAX_PHRASES}.")
    longest = max(map(len, phrases))
    if longest > MAX_PHRASE_LENGTH:
        raise ValueError(f"A phrase has {longest:,} characters: give at most {MAX_PHRASE_LENGTH:,}.")
    return phrases


def _as_number(threshold: Any) -> Any:
    """Return a threshold that came in the address of a request, as text; the pipeline checks it."""
    try:
        return float(threshold) if isinstance(threshold, str) else threshold
    except ValueError as error:
        raise ValueError("threshold is no number: give a probability from 0 to 1.") from error


def _checked_image(image: Any) -> Image.Image:
    """Return an image that came with a request; its size is checked before memory is taken for its pixels."""
    if isinstance(image, str):
        image = _open_base64(image)
    elif not isinstance(image, Image.Image):
        raise ValueError("The request has no image: give its file in base64, or send the image itself as the request.")
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(
            f"The image has {image.width} x {image.height} pixels: make it smaller, to at most {MAX_PIXELS:,} pixels."
        )
    try:
        image.load()
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise errors of many types
        raise ValueError("The image is broken: send it again.") from error
    return image


def _open_base64(text: str) -> Image.Image:
    header, comma, content = text.partition(",") if text.startswith("data:") else ("", "", text)
    if len(content) > MAX_IMAGE_BYTES * 4 / 3 * 1.05:  # there may be line breaks
        raise ValueError(f"The image's file is too large: send at most {MAX_IMAGE_BYTES:,} bytes.")
    try:
        if header and not (comma and header.endswith(";base64")):
            raise ValueError("a data URI without base64")
        file = base64.b64decode("".join(content.split()), validate=True)
        return Image.open(io.BytesIO(file), formats=FORMATS)
    except MemoryError:
        raise
    except (ValueError, binascii.Error) as error:
        raise ValueError(
            "The image is no base64 text: send the file itself in base64; addresses and paths are not read."
        ) from error
    except Exception as error:  # a hostile header makes Pillow raise errors of many types
        raise ValueError(f"The image cannot be read: send one of {', '.join(FORMATS)} in base64.") from error


def _as_png(mask: Image.Image) -> str:
    file = io.BytesIO()
    mask.save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode("ascii")
