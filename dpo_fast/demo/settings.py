"""Every number that the demo's training depends on, in one place."""

from dataclasses import dataclass

STRATEGIES = ("frozen", "adapter", "precomputed", "ema")


@dataclass(frozen=True)
class Settings:
    """Sizes, steps and rates; the defaults are the demo's, tests use smaller ones."""

    seed: int = 0
    use_cpu: bool = True
    # model
    vocab_size: int = 1024
    hidden_size: int = 96
    num_layers: int = 2
    num_heads: int = 4
    # supervised fine-tuning, on right and wrong answers alike
    sft_steps: int = 250
    sft_batch: int = 32
    sft_learning_rate: float = 4e-3
    # DPO
    steps: int = 360
    batch: int = 32
    beta: float = 0.5
    likelihood_weight: float = 0.3  # of the chosen answers, so that the model goes on speaking
    learning_rate: float = 2e-3
    warmup_steps: int = 36
    eval_steps: int = 72
    lora_rank: int = 32
    lora_learning_rate: float = 5e-3
    ema_alpha: float = 0.6
    ema_every: int = 32


@dataclass(frozen=True)
class Thresholds:
    """What the demo must show; its exit code is 0 only then."""

    baseline_at_most: float = 0.6
    before_at_most: float = 0.65
    after_above: float = 0.9
