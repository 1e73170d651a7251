"""Many answers at once: the aligner corrects a batch together, and calls that run at the same time share its passes."""

import asyncio
import time

from local_models import rude, show
from rich.console import Console

from aligner_middleware import AlignerRunnable

QUESTIONS = ["What is the capital of Spain?", "What is snow?", "What is the capital of Egypt?", "What is a river?"]


def main() -> None:
    """Correct a batch, and the same answers as concurrent tasks."""
    console = Console()
    aligner, llm = rude(console)
    align = AlignerRunnable(aligner, keep_original=True)
    answers = llm.batch([*QUESTIONS])

    start = time.perf_counter()
    for question, message in zip(QUESTIONS, align.batch(answers), strict=True):  # each message knows its question
        show(console, question, message)
    console.print(f"{len(answers)} answers together: {time.perf_counter() - start:.2f} s")

    async def concurrently() -> None:
        await asyncio.gather(*(align.ainvoke(answer) for answer in answers))

    start = time.perf_counter()
    asyncio.run(concurrently())
    console.print(f"{len(answers)} tasks at once:    {time.perf_counter() - start:.2f} s")


if __name__ == "__main__":
    main()
