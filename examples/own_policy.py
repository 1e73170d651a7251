"""A policy of your own: when to correct, what to do when that fails, how long it may take, and who is told."""

from __future__ import annotations

from collections import Counter

from langchain_core.runnables import ConfigurableField
from local_models import rude
from rich.console import Console

from aligner_middleware import AlignerRunnable, Correction

RUDE_WORDS = {"idiot", "moron", "stupid", "sheep", "lazy"}


def looks_rude(question: str, answer: str) -> bool:
    """Correct only what a cheap test finds suspicious."""
    return bool(RUDE_WORDS & set(answer.lower().replace(".", " ").replace(",", " ").split()))


def main() -> None:
    """Count corrections, skip polite answers, and change the policy for one call."""
    console = Console()
    aligner, llm = rude(console)
    counts: Counter[str] = Counter()

    def count(correction: Correction) -> None:
        counts["changed" if correction.changed else "kept"] += 1
        console.print("words removed:", correction.diff().removed, "added:", correction.diff().added)
        console.print(correction)  # shows itself with the changed words marked

    align = AlignerRunnable(
        aligner,
        when=looks_rude,
        fallback="I cannot answer that just now.",
        timeout=10,
        max_answer_tokens=512,
        on_long_answer="piecewise",
        on_correction=count,
    ).configurable_fields(when=ConfigurableField(id="when"))

    chain = llm | align
    for question in ("What is the capital of Australia?", "What is the capital of Italy?"):
        console.print("\n[bold]" + question, chain.invoke(question).text, sep="\n")
    console.print("\n[bold]never, in this call")
    console.print(chain.invoke("What is snow?", {"configurable": {"when": lambda question, answer: False}}).text)
    console.print("\n", dict(counts))


if __name__ == "__main__":
    main()
