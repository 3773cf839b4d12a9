"""Run the paper's experiments at any size: `shielded reproduce {diversity,tradeoff,sparsity,shielding}`."""

from shielded.evaluation.reproduce.experiments import EXPERIMENTS, SWEEPS
from shielded.evaluation.reproduce.reference import emoji_prompts, prompts_of
from shielded.evaluation.reproduce.report import markdown, reproduce, write_section
from shielded.evaluation.reproduce.study import Setting, Study

__all__ = [
    "EXPERIMENTS",
    "SWEEPS",
    "Setting",
    "Study",
    "emoji_prompts",
    "markdown",
    "prompts_of",
    "reproduce",
    "write_section",
]
