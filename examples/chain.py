"""The aligner as one step of a chain: prompt | model | aligner | parser."""

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from local_models import rude
from rich.console import Console

from aligner_middleware import AlignerRunnable


def main() -> None:
    """Ask once for a message, and once for plain text."""
    console = Console()
    aligner, llm = rude(console)
    prompt = ChatPromptTemplate.from_messages([("human", "What is the capital of {country}?")])

    chain = prompt | llm | AlignerRunnable(aligner)
    message = chain.invoke({"country": "Australia"})
    console.print("message:", message.text)
    console.print("report: ", message.response_metadata["aligner"])

    text = prompt | llm | StrOutputParser() | AlignerRunnable(aligner)  # the question is found after a parser, too
    console.print("text:   ", text.invoke({"country": "Italy"}))


if __name__ == "__main__":
    main()
