"""What a run leaves behind: metrics, predictions, the table, and the model card."""

import csv
import json
import logging
import os
import statistics
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pandas as pd
from huggingface_hub import ModelCard
from transformers.trainer_utils import PredictionOutput

from configuration_detris import one_line
from data.mixture import Member, parse_mixture, public_names
from data.opening import is_prepared
from data.tables import HUB
from model_card import METRIC_NAMES, make_model_card

from .arguments import DataArguments
from .checkpoints import TRAINER_STATE_NAME, read_state
from .evaluating_trainer import PADDING
from .predictions import PictureWriter, make_anew, write_results
from .report import REPORT, SplitResults, split_results, write_page
from .rows import dataset_and_split, results_name, shown_names
from .trainer import DetrisTrainer

logger = logging.getLogger(__name__)


class Evaluated(NamedTuple):
    """What an evaluation has found out."""

    metrics: dict[str, float]  # all of them
    card: list[dict[str, Any]]  # for each split `dataset` (as `card_name`), `split` and the metrics by `METRIC_NAMES`
    table: list[dict[str, Any]]  # for each test split its cells by their heads; the mean of them comes last
    splits: list[SplitResults]  # what was predicted, on the main process


def evaluate_and_predict(
    trainer: DetrisTrainer, data_args: DataArguments, members: list[Member], test_rows: dict[str, datasets.Dataset]
) -> Evaluated:
    """Evaluate and predict, as far as it is asked for, and write metrics, predictions and the table.

    Args:
        members: data sets that are trained on. Test splits without the name of a data set are the first one's.
        test_rows: what to predict, by the names of the test splits.
    """
    args, metrics = trainer.args, {}
    own_set = card_name(members[0].name, data_args)
    first_phrase = ", first phrases" if data_args.eval_first_phrase_only else ""
    first_objects = f", first {data_args.max_eval_samples} objects" if data_args.max_eval_samples else ""
    lines, results, splits = [], [], []  # of the table, of the card, of the report
    if args.do_eval:
        metrics |= report(trainer, "eval", trainer.evaluate())
        result = {"dataset": own_set, "split": data_args.eval_split + first_phrase + first_objects}
        results.append(result | _figures(metrics, "eval"))
    shown = shown_names(test_rows)
    for split, rows in test_rows.items():
        name = results_name(shown[split])
        folder = Path(args.output_dir, "predictions", name)
        output = predict(trainer, rows, name, folder)
        metrics |= report(trainer, name, output.metrics)
        figures = _figures(output.metrics, name)
        dataset, split_name = dataset_and_split(split, "")
        label = shown[split].removeprefix(HUB)
        line = {"split": label, "objects": len(rows), "phrases": int((output.predictions[..., 0] != PADDING).sum())}
        lines.append(line | {METRIC_NAMES[key]: 100 * value for key, value in figures.items()})
        result = {
            "dataset": card_name(dataset, data_args) if dataset else own_set,
            "split": split_name + first_objects,
        }
        if not any(result.items() <= other.items() for other in results):  # do_eval may have run over the same split
            results.append(result | figures)
        if trainer.is_world_process_zero():
            write_results(folder, rows, output.predictions, trainer.metric, with_masks=args.save_masks)
            splits.append(split_results(label, rows, output.predictions, trainer.metric))
    if lines:
        lines.append(_mean(lines))
        if trainer.is_world_process_zero():
            print(f"\n{write_table(Path(args.output_dir), lines)}\n")
    return Evaluated(metrics, results, lines, splits)


def predict(trainer: DetrisTrainer, rows: datasets.Dataset, name: str, folder: Path) -> PredictionOutput:
    """Segment rows; meanwhile each process writes masks and pictures of those it segments, if `save_masks` says so.

    Args:
        name: begins the names of the metrics.
        folder: is made anew.
    """
    main = trainer.is_world_process_zero()
    if main:
        make_anew(folder)
    trainer.accelerator.wait_for_everyone()
    if not trainer.args.save_masks:
        return trainer.predict(rows, metric_key_prefix=name)
    with PictureWriter(folder, rows, trainer.metric, shows_progress=main and not trainer.args.disable_tqdm) as writer:
        output = trainer.predict(rows, metric_key_prefix=name, receive=writer.add)
    trainer.accelerator.wait_for_everyone()  # the results are written when all pictures are
    return output


def _figures(metrics: dict[str, float], prefix: str) -> dict[str, float]:
    """The figures in `METRIC_NAMES`, without the prefix that Trainer puts before their names."""
    return {key: metrics[f"{prefix}_{key}"] for key in METRIC_NAMES if f"{prefix}_{key}" in metrics}


def report(trainer: DetrisTrainer, name: str, metrics: dict[str, float]) -> dict[str, float]:
    """Print metrics, save them as `<name>_results.json` and in `all_results.json`, and return them."""
    trainer.log_metrics(name, metrics)
    trainer.save_metrics(name, metrics)
    return metrics


def _mean(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The line below the others: the plain mean of each figure, over the splits that have it."""
    heads = [head for head in METRIC_NAMES.values() if any(head in line for line in lines)]
    mean = {head: statistics.fmean(line[head] for line in lines if head in line) for head in heads}
    return {"split": "mean of the rows"} | mean


def write_table(folder: Path, lines: list[dict[str, Any]]) -> str:
    """Write the paper's table, in percent, as `table.txt`, `table.md` and `table.json`, and return it as text.

    Args:
        folder: exists.
        lines: for each split its name, objects, phrases and figures, which are called as in `METRIC_NAMES`; then their
            mean, which has neither objects nor phrases.
    """
    table = pd.DataFrame([*lines[:-1], lines[-1] | {"objects": "", "phrases": ""}])
    text = table.to_string(index=False, float_format="{:.2f}".format, na_rep="-")
    header, *body = table.to_csv(
        sep="|", index=False, float_format="%.2f", na_rep="-", quoting=csv.QUOTE_NONE, escapechar="\\"
    ).splitlines()
    markdown = [header, "|".join(["---"] + ["---:"] * (len(table.columns) - 1)), *body]
    (folder / "table.txt").write_text(text + "\n", encoding="utf-8")
    (folder / "table.md").write_text("".join(f"|{line}|\n" for line in markdown), encoding="utf-8")
    (folder / "table.json").write_text(json.dumps(lines, indent=2) + "\n", encoding="utf-8")
    return text


def card_name(dataset: str, data_args: DataArguments) -> str:
    """A data set's name for the model card: `hub:<id>` if it is the Hub's, else that of `public_names`."""
    of_hub = not os.path.exists(dataset) and (dataset.startswith(HUB) or is_prepared(dataset, data_args.data_root))
    names = [member.name for member in parse_mixture(data_args.dataset, data_args.train_split)]
    names += [dataset_and_split(name, "")[0] for name in data_args.test_splits]
    return HUB * of_hub + public_names(filter(None, [dataset, *names]))[dataset]


def write_card(
    trainer: DetrisTrainer, data_args: DataArguments, members: list[Member], results: list[dict[str, Any]]
) -> None:
    """Write the model card into the output folder.

    Args:
        members: the data sets that were trained on, if anything was.
        results: for each split that was evaluated, `dataset`, `split` and the metrics by `METRIC_NAMES`.
    """
    args = trainer.args
    origin, trained_on = "Evaluated with `train_hf.py`.", []
    earlier_card = Path(trainer.model.name_or_path, "README.md")
    if not args.do_train and earlier_card.is_file():
        earlier = ModelCard.load(earlier_card, ignore_metadata_errors=True).data
        known = earlier.get("trained_on") or earlier.datasets or []
        trained_on = [one_line(name) for name in (known if isinstance(known, list) else [known])]
    if args.do_train:
        trained_on = [
            (f"{member.weight:g}*" if member.weight != 1 else "") + card_name(member.name, data_args)
            for member in members
        ]
        origin = (
            f"Trained with `train_hf.py`: {trainer.state.global_step} steps of "
            f"{args.train_batch_size * args.world_size * args.gradient_accumulation_steps} objects, learning rate "
            f"{args.learning_rate:g}, seed {args.seed}."
        )
        if trainer.mixture is not None:
            origin += f" {trainer.mixture.describe_leaks()}"
        elif {result["dataset"] for result in results} - {card_name(members[0].name, data_args)}:
            origin += " Its training images were not compared with those of the other data sets it is tested on."
    name = trainer.hub_model_id or Path(args.output_dir).name
    card = make_model_card(
        trainer.model.config, name, origin, trained_on, results, args.model_license, args.save_adapter_only
    )
    card.save(Path(args.output_dir) / "README.md")


def write_report(trainer: DetrisTrainer, data_args: DataArguments, evaluated: Evaluated) -> None:
    """Write `report.html` into the output folder. If that fails, say why and go on: all else has been written."""
    folder = Path(trainer.args.output_dir)
    table = evaluated.table or [
        {"split": f"{result['dataset'].removeprefix(HUB)}:{result['split']}"}
        | {METRIC_NAMES[key]: 100 * result[key] for key in METRIC_NAMES if key in result}
        for result in evaluated.card
    ]
    try:
        history, model_folder = trainer.state.log_history, Path(trainer.model.name_or_path)
        if not trainer.args.do_train and model_folder.resolve() == folder.resolve():  # it was trained there before
            history = read_state(folder).log_history if (folder / TRAINER_STATE_NAME).exists() else []
        path = write_page(
            folder,
            history,
            data_args.eval_split,
            table,
            evaluated.splits,
            segment=lambda row: trainer.segment(row).mask(0),
        )
        print(f"Curves, figures and masks of the run are in {path}.\n")
    except Exception:
        logger.warning(f"{folder / REPORT} could not be made; all other results are whole.", exc_info=True)
