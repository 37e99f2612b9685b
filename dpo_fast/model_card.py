"""The README of a trained model: what it is, what it was trained against, with what."""

from pathlib import Path
from typing import Any

from dpo_fast import __version__

DPO_CITATION = """@inproceedings{rafailov2023direct,
  title = {{Direct Preference Optimization: Your Language Model is Secretly a Reward Model}},
  author = {Rafael Rafailov and Archit Sharma and Eric Mitchell and Christopher D. Manning and
            Stefano Ermon and Chelsea Finn},
  booktitle = {Advances in Neural Information Processing Systems 36},
  year = {2023},
  eprint = {2305.18290},
  archivePrefix = {arXiv},
}"""


def write_model_card(folder: str | Path, trainer: Any) -> Path:
    """Write ``README.md`` for the model that ``trainer`` trains into ``folder``; return its
    path.
    """
    path = Path(folder) / "README.md"
    path.write_text(model_card(trainer))
    return path


def model_card(trainer: Any) -> str:
    """Text of the card: YAML header of the hub, then a few facts of the run."""
    args = trainer.args
    base = getattr(trainer.model.config, "_name_or_path", "") or None
    name = Path(args.hub_model_id or args.output_dir).name
    header = ["library_name: transformers", f"model_name: {name}", "tags:"]
    header += [f"- {tag}" for tag in trainer._tag_names]
    if base is not None and not Path(base).exists():  # a hub name, not a folder of this machine
        header.insert(0, f"base_model: {base}")
    reference = getattr(trainer.reference, "name", "none")
    rows = {
        "loss": ", ".join(map(str, args.loss_type)),
        "beta": args.beta,
        "reference": reference,
        "learning rate": args.learning_rate,
        "pairs a step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "longest sequence": args.max_length,
        "steps": trainer.state.global_step,
    }
    lines = [f"| {key} | {value} |" for key, value in rows.items()]
    return "\n".join(
        [
            "---",
            *header,
            "---",
            "",
            f"# {name}",
            "",
            "Trained with Direct Preference Optimization ([arXiv "
            "2305.18290](https://arxiv.org/abs/2305.18290)) by "
            f"dpo_fast {__version__}.",
            "",
            "| setting | value |",
            "|---|---|",
            *lines,
            "",
            "```bibtex",
            DPO_CITATION,
            "```",
            "",
        ]
    )
