"""IoU of referring image segmentation as an `evaluate` metric. See README.md beside this file."""

from typing import Any

import datasets
import evaluate
import numpy as np
import torch

EPSILON = 1e-6  # pixels added to each pair's union, as the official evaluation does
PRECISION_THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9)

DESCRIPTION = """
Mean IoU, overall IoU and precision at IoU thresholds over pairs of binary masks, one pair for each phrase. Where some
phrases name nothing, also gIoU, cIoU, N-acc and T-acc.
A pair is counted when it is added, and three integers are kept of it: intersection, union and the reference's area.
"""
INPUTS_DESCRIPTION = """
Args:
    predictions, references: binary masks (H, W), each pair of its own size: nested lists, arrays or tensors on any
        device, zero outside the object. Threshold probabilities and logits first.
    intersection, union, reference_area: instead of masks, the pixels of pairs, as `count` gives them.

Returns, as fractions:
    mean_iou: mean over pairs of intersection / (union + 1e-6).
    overall_iou: sum of intersections / sum of unions.
    precision@0.5 ... precision@0.9: share of pairs whose IoU is greater than the threshold.

    Only if some reference is empty (a no-target phrase), also those of generalized referring segmentation:
    giou: mean over pairs of intersection / union, where a pair of empty masks counts 1.
    ciou: sum of intersections / sum of unions; a mask predicted for a no-target phrase adds its pixels to the unions.
        Left out where all masks are empty.
    n_acc: share of the no-target phrases for which nothing is predicted, TP / (TP + FN).
    t_acc: share of the phrases with targets for which something is predicted, TN / (TN + FP). Left out where there
        are none.

Source: Liu, Ding and Jiang, "GRES: Generalized Referring Expression Segmentation", CVPR 2023, section on metrics, and
their `gres_model/evaluation/refer_evaluation.py` (github.com/henghuiding/ReLA) for gIoU and cIoU. There a head of the
model says that there is no target; here a mask without a single pixel says so. That file adds 1 to the denominators of
its accuracies, and its T_acc is TP / (TP + FP + 1); here both are as in the paper.
"""
CITATION = """
@inproceedings{liu2023gres,
  title={GRES: Generalized Referring Expression Segmentation},
  author={Liu, Chang and Ding, Henghui and Jiang, Xudong},
  booktitle={CVPR},
  year={2023}
}
"""
COUNTS = ("intersection", "union", "reference_area")  # numbers of pixels that are kept of each pair
MAX_COUNT = 2**40  # pixels; the sum over eight million pairs stays within 64 bits


class ReferringIou(evaluate.Metric):
    """IoU over pairs of masks, three integers kept of each; loaded by `evaluate.load("metrics/referring_iou")`."""

    def _info(self) -> evaluate.MetricInfo:
        """Describe the metric and its inputs, as `evaluate` asks."""
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS_DESCRIPTION,
            features=datasets.Features({name: datasets.Value("int64") for name in COUNTS}),
            format="numpy",
        )

    @staticmethod
    def count(prediction: Any, reference: Any) -> tuple[int, int, int]:
        """Count the pixels of a pair of binary masks (H, W): those in both, in at least one, and in the reference.

        Raises:
            ValueError: the masks differ in size, are not two-dimensional, or are not binary.
        """
        prediction, reference = _foreground(prediction, "prediction"), _foreground(reference, "reference")
        if prediction.shape != reference.shape:
            raise ValueError(
                f"The prediction is {tuple(prediction.shape)} and the reference {tuple(reference.shape)} (height, "
                "width); bring the prediction to the original size first."
            )
        return tuple(ReferringIou.count_on_device(prediction, reference).tolist())

    @staticmethod
    def count_on_device(predictions: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        """Count as `count` does, but for masks on a device, where the counts stay: nobody waits for them.

        Args:
            predictions, references: booleans (..., H, W) that are broadcast to each other. They are not checked.

        Returns:
            The three counts of each pair, integers (..., 3).
        """
        masks = (predictions & references, predictions | references, references)
        areas = [mask.sum(dim=(-2, -1), dtype=torch.int32) for mask in masks]  # 64 bits would take three times as long
        return torch.stack(torch.broadcast_tensors(*areas), dim=-1)

    @staticmethod
    def iou(intersection: np.ndarray | int, union: np.ndarray | int) -> np.ndarray | float:
        """The IoU of one pair, or of each of N pairs from counts (N,); 0 where both masks are empty."""
        return np.asarray(intersection) / (np.asarray(union) + EPSILON)

    def add(self, *, prediction: Any, reference: Any) -> None:
        """Count one pair of masks (H, W)."""
        super().add(**dict(zip(COUNTS, self.count(prediction, reference), strict=True)))

    def add_batch(
        self,
        *,
        predictions: Any = None,
        references: Any = None,
        intersection: Any = None,
        union: Any = None,
        reference_area: Any = None,
    ) -> None:
        """Count N pairs of masks (H, W), or add the counts (N,) of pairs that `count` has counted.

        Raises:
            ValueError: as `count`, or no two masks can have these counts.
        """
        counted = (intersection, union, reference_area)
        if predictions is not None and references is not None:
            if len(predictions) != len(references):
                raise ValueError(f"There are {len(predictions)} predictions but {len(references)} references.")
            counts = [self.count(*pair) for pair in zip(predictions, references, strict=True)]
        elif all(count is not None for count in counted):
            counted = [_whole_numbers(count, name) for name, count in zip(COUNTS, counted, strict=True)]
            if len({len(count) for count in counted}) > 1:
                lengths = ", ".join(f"{len(count)} of {name}" for name, count in zip(COUNTS, counted, strict=True))
                raise ValueError(f"Each pair has one of each count, but there are {lengths}.")
            _refuse_impossible(*counted)
            counts = [tuple(map(int, pair)) for pair in zip(*counted, strict=True)]
        else:
            raise ValueError(f"Masks are given as predictions and references, counts as {', '.join(COUNTS)}.")
        if counts:
            super().add_batch(**dict(zip(COUNTS, zip(*counts, strict=True), strict=True)))

    def compute(self, **pairs: Any) -> dict[str, float] | None:
        """Compute the metrics of all pairs that were added, and of `pairs`, given as to `add_batch`; then forget them.

        Returns:
            The metrics by name, as fractions; None on processes other than the first if the metric was loaded with
            `num_process`.

        Raises:
            ValueError: there are no pairs.
        """
        if any(value is not None for value in pairs.values()):
            self.add_batch(**pairs)
        if self.writer is None:
            raise ValueError("There are no pairs of masks to compute IoU over; call `add` or `add_batch` first.")
        return super().compute()

    def _compute(self, intersection: np.ndarray, union: np.ndarray, reference_area: np.ndarray) -> dict[str, float]:
        """The metrics from the counts (N,) of all pairs, as `evaluate` asks."""
        ious = self.iou(intersection, union)  # (N,)
        figures = {
            "mean_iou": float(ious.mean()),
            "overall_iou": float(intersection.sum() / max(union.sum(), 1)),
            **{f"precision@{x}": float((ious > x).mean()) for x in PRECISION_THRESHOLDS},
        }
        has_target = reference_area > 0  # (N,)
        if has_target.all():
            return figures
        has_prediction = union - reference_area + intersection > 0  # (N,)
        figures["giou"] = float(np.where(union == 0, 1, intersection / np.maximum(union, 1)).mean())
        if union.any():
            figures["ciou"] = figures["overall_iou"]
        figures["n_acc"] = float((~has_prediction[~has_target]).mean())
        if has_target.any():
            figures["t_acc"] = float(has_prediction[has_target].mean())
        return figures


def _whole_numbers(counts: Any, name: str) -> np.ndarray:
    """The counts as an array (N,) of integers; ValueError if they are not that."""
    counts = np.asarray(counts.cpu() if isinstance(counts, torch.Tensor) else counts)
    if counts.ndim != 1 or (counts.dtype.kind not in "iu" and counts.size):
        raise ValueError(
            f"{name} holds {counts.dtype} values of shape {counts.shape}; give a whole number of pixels for each pair."
        )
    return counts


def _refuse_impossible(intersection: np.ndarray, union: np.ndarray, reference_area: np.ndarray) -> None:
    """Refuse counts (N,) that no two masks can have with a ValueError."""
    possible = (
        (intersection >= 0) & (intersection <= reference_area) & (reference_area <= union) & (union <= MAX_COUNT)
    )
    if not possible.all():
        pair = int(np.argmin(possible))
        raise ValueError(
            f"Pair {pair} has {intersection[pair]} pixels in both masks, {union[pair]} in at least one and "
            f"{reference_area[pair]} in the reference, which no two masks have; count them by `count`."
        )


def _foreground(mask: Any, name: str) -> torch.Tensor:
    """Where a mask (H, W) is not zero, as booleans on the CPU; ValueError if it is no binary mask."""
    mask = mask if isinstance(mask, torch.Tensor) else np.asarray(mask)
    if mask.ndim != 2:
        raise ValueError(f"A {name} is one mask (height, width), but its shape is {tuple(mask.shape)}.")
    if not isinstance(mask, torch.Tensor) and mask.dtype.kind not in "biuf":
        raise ValueError(f"A {name} holds {mask.dtype} values; give numbers, zero outside the object.")
    foreground = mask != 0
    if ("float" in str(mask.dtype) or "complex" in str(mask.dtype)) and (mask[foreground] != 1).any():
        raise ValueError(f"A {name} holds numbers other than 0 and 1; threshold it first.")
    return torch.as_tensor(foreground, device="cpu")
