"""What the preparation of a dataset did to its rows."""

import logging
from dataclasses import dataclass, field

logger = logging.getLogger("dpo_fast.data")


@dataclass(frozen=True)
class PrepareReport:
    """Counts of one prepared dataset. A stream is prepared while it is read: its counts are None.

    Attributes:
        name: the dataset's name, such as "train".
        rows_in: pairs given.
        rows_out: pairs that can be trained on.
        dropped: pairs left out, by reason.
        truncated: pairs kept of which an answer's sequence exceeds ``max_length``.
        prompt_not_prefix: pairs given whose tokenised prompt does not begin its conversations.
        prompt_example: the end of one such prompt that is left out of training.
    """

    name: str
    rows_in: int | None
    rows_out: int | None
    dropped: dict[str, int] = field(default_factory=dict)
    truncated: int | None = None
    prompt_not_prefix: int | None = None
    prompt_example: str | None = None

    def describe(self) -> str:
        """The counts in one line."""
        if self.rows_in is None:
            return f"{self.name}: a stream, prepared while it is read"
        parts = [f"{self.name}: {self.rows_out} of {self.rows_in} pairs kept"]
        parts += [f"{count} dropped ({reason})" for reason, count in self.dropped.items()]
        if self.truncated:
            parts.append(f"{self.truncated} truncated")
        if self.prompt_not_prefix:
            parts.append(f"{self.prompt_not_prefix} with a prompt that is not a prefix")
        return ", ".join(parts)


def prompt_warning(name: str, example: str, count: str) -> str:
    """Warning about prompts that do not begin their tokenised conversations."""
    return (
        f"{name}: in {count} the tokenised prompt is not the beginning of the tokenised prompt and "
        "answer: the chat template renders the prompt differently alone, or tokens merge where the "
        f"answer starts. The answer starts where they differ, and this end of the prompt is not "
        f"trained on: {example!r}. At inference the model will see it. Use a chat template that "
        "renders the prompt the same way in both cases, or end the prompt where a token ends"
    )
