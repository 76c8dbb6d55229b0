"""IoU of referring image segmentation as an `evaluate` metric. See README.md beside this file."""

from typing import Any

import datasets
import evaluate
import numpy as np
import torch

EPSILON = 1e-6  # pixels added to each pair's union, as the official evaluation does
PRECISION_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)

DESCRIPTION = """
Mean IoU, overall IoU and precision at IoU thresholds over pairs of binary masks, one pair for each phrase.
Pairs are counted when they are added; only their intersection and union, two integers, are kept.
"""
INPUTS_DESCRIPTION = """
Args:
    predictions, references: binary masks (H, W), each pair of its own size: nested lists, arrays or tensors on any
        device, zero outside the object. Probabilities and logits must be thresholded first.
    intersection, union: instead of masks, pixels of pairs that `count` has already counted.

Returns, as fractions:
    mean_iou: mean over pairs of intersection / (union + 1e-6).
    overall_iou: sum of intersections / sum of unions.
    precision@0.5 ... precision@0.9: share of pairs whose IoU is greater than the threshold.
"""


class ReferringIou(evaluate.Metric):
    """`evaluate.load("metrics/referring_iou")`: IoU over pairs of masks, kept as two integers a pair."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=INPUTS_DESCRIPTION,
            features=datasets.Features({"intersection": datasets.Value("int64"), "union": datasets.Value("int64")}),
            format="numpy",
        )

    @staticmethod
    def count(prediction: Any, reference: Any) -> tuple[int, int]:
        """Count the pixels of a pair of binary masks (H, W): those in both, and those in at least one.

        Raises:
            ValueError: the masks differ in size, are not two-dimensional, or are not binary.
        """
        prediction, reference = _foreground(prediction, "prediction"), _foreground(reference, "reference")
        if prediction.shape != reference.shape:
            raise ValueError(
                f"The prediction is {tuple(prediction.shape)} and the reference {tuple(reference.shape)} (height, "
                "width); bring the prediction to the original size first."
            )
        return int(np.count_nonzero(prediction & reference)), int(np.count_nonzero(prediction | reference))

    @staticmethod
    def iou(intersection: np.ndarray | int, union: np.ndarray | int) -> np.ndarray | float:
        """IoU of each pair from its counts (N,) or of one pair; 0 where both masks are empty."""
        return np.asarray(intersection) / (np.asarray(union) + EPSILON)

    def add(self, *, prediction: Any, reference: Any) -> None:
        """Count one pair of masks (H, W)."""
        intersection, union = self.count(prediction, reference)
        super().add(intersection=intersection, union=union)

    def add_batch(self, *, predictions=None, references=None, intersection=None, union=None) -> None:
        """Count pairs of masks (H, W), or take over pairs already counted: intersection (N,), union (N,)."""
        if predictions is not None and references is not None:
            if len(predictions) != len(references):
                raise ValueError(f"There are {len(predictions)} predictions but {len(references)} references.")
            counts = [self.count(*pair) for pair in zip(predictions, references, strict=True)]
        elif intersection is not None and union is not None:
            if len(intersection) != len(union):
                raise ValueError(f"There are {len(intersection)} intersections but {len(union)} unions.")
            counts = [(int(both), int(either)) for both, either in zip(intersection, union, strict=True)]
        else:
            raise ValueError("Masks are given as predictions and references, counts as intersection and union.")
        if counts:
            intersection, union = zip(*counts, strict=True)
            super().add_batch(intersection=intersection, union=union)

    def compute(self, **pairs: Any) -> dict[str, float] | None:
        """The metrics of all pairs added so far, and of those given here as to `add_batch`; then forgets them.

        Returns `None` on processes other than the first when the metric was loaded with `num_process`.

        Raises:
            ValueError: there are no pairs.
        """
        if any(value is not None for value in pairs.values()):
            self.add_batch(**pairs)
        if self.writer is None:
            raise ValueError("There are no pairs of masks to compute IoU over; call `add` or `add_batch` first.")
        return super().compute()

    def _compute(self, intersection: np.ndarray, union: np.ndarray) -> dict[str, float]:
        ious = self.iou(intersection, union)  # (N,)
        return {
            "mean_iou": float(ious.mean()),
            "overall_iou": float(intersection.sum() / max(union.sum(), 1)),
            **{f"precision@{x}": float((ious > x).mean()) for x in PRECISION_THRESHOLDS},
        }


def _foreground(mask: Any, name: str) -> np.ndarray:
    """Where a binary mask (H, W) is not zero."""
    mask = mask if isinstance(mask, torch.Tensor) else np.asarray(mask)
    if mask.ndim != 2:
        raise ValueError(f"A {name} is one mask (height, width), but its shape is {tuple(mask.shape)}.")
    foreground = mask != 0
    if "float" in str(mask.dtype) and (mask[foreground] != 1).any():
        raise ValueError(f"A {name} holds numbers other than 0 and 1; threshold it first.")
    return foreground.cpu().numpy() if isinstance(foreground, torch.Tensor) else foreground
