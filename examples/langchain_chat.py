"""Questions on an indexed document by LangChain (``pip install langchain-openai``), with ``vllm serve`` running:
``python examples/langchain_chat.py examples/data/persuasion.txt "Where does the family live?"``.

The document was indexed with --chat-system. The server is asked to tell in the answer what became of it.
"""

import argparse
import os
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document", type=Path, help="text file, as it was indexed")
    parser.add_argument("question")
    parser.add_argument("--model", help="as the server calls it (default: its first)")
    arguments = parser.parse_args()
    from langchain_core.prompts import ChatPromptTemplate
    from langchain_openai import ChatOpenAI
    from openai_client import connect

    model = ChatOpenAI(
        model=arguments.model or connect().models.list().data[0].id,
        base_url=os.environ.get("OPENAI_BASE_URL", "http://localhost:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "unused"),
        temperature=0,
        max_tokens=64,
        extra_body={"kv_transfer_params": {"squeeze": {}}},
    )
    # The document is a variable of the prompt: braces in it are text.
    prompt = ChatPromptTemplate([("system", "{document}"), ("user", "{question}")])
    document = arguments.document.read_text(encoding="utf-8")
    answer = (prompt | model).invoke({"document": document, "question": arguments.question})
    print(answer.content)
    print(answer.response_metadata.get("kv_transfer_params", "The client left out what the server told."))


if __name__ == "__main__":
    main()
