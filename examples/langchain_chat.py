"""Questions on an indexed document by LangChain (``pip install langchain-openai``), with ``vllm serve`` running:
``python examples/langchain_chat.py examples/data/persuasion.txt "Where does the family live?"``.

The document was indexed with --chat-system. ``--mode dense`` leaves the request to vLLM's own attention, to compare. What
the server tells of a request LangChain does not hand on; the plain client does (docs/operating.md, "One request").
"""

import argparse

from openai_client import connect, text_in


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("document", type=text_in, help="text file, as it was indexed")
    parser.add_argument("question")
    parser.add_argument("--mode", choices=("auto", "dense"), default="auto", help="of this request")
    parser.add_argument("--model", help="as the server calls it (default: its first)")
    arguments = parser.parse_args()
    from langchain_core.prompts import ChatPromptTemplate
    from langchain_openai import ChatOpenAI

    client = connect()
    model = ChatOpenAI(
        model=arguments.model or client.models.list().data[0].id,
        base_url=str(client.base_url),
        api_key=client.api_key,
        temperature=0,
        max_tokens=64,
        extra_body={"kv_transfer_params": {"squeeze": {"mode": arguments.mode}}},
    )
    # The document is a variable of the prompt: braces in it are text.
    prompt = ChatPromptTemplate([("system", "{document}"), ("user", "{question}")])
    print((prompt | model).invoke({"document": arguments.document, "question": arguments.question}).content)


if __name__ == "__main__":
    main()
