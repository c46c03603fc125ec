"""A LangChain agent whose model is the server: `python examples/langchain_agent.py`.

The tool runs here. Its result is the answer (`return_direct`), since the shipped model calls tools but cannot talk
about what they say; a model that can does not need it. Asks the server that OPENAI_BASE_URL names, else the one that
`python serve.py` starts. Needs `pip install langchain langchain-openai`.
"""

import os

from langchain.agents import create_agent
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI


@tool(return_direct=True)
def get_weather(city: str, date: str = "today") -> str:
    """Weather of a place"""
    print(f"get_weather(city={city!r}, date={date!r})")
    return f"{city}, {date}: sunny, 21 degrees"


os.environ.setdefault("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
os.environ.setdefault("OPENAI_API_KEY", "none")
agent = create_agent(ChatOpenAI(model="smollm-diffusion"), [get_weather])
found = agent.invoke({"messages": [{"role": "user", "content": "What is the weather in Lisbon?"}]})
print(found["messages"][-1].content)
