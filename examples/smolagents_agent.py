"""A smolagents agent whose model is the server: `python examples/smolagents_agent.py`.

The agent asks for one call a step (`tool_choice="required"`), runs the tool here, and ends with a call of its own tool
`final_answer`. Asks the server that OPENAI_BASE_URL names, else the one that `python serve.py` starts. Needs
`pip install smolagents openai`.
"""

import os

from smolagents import OpenAIModel, ToolCallingAgent, tool


@tool
def get_weather(city: str, date: str = "today") -> str:
    """Weather of a place

    Args:
        city: Name of the city
        date: Day as said by the user
    """
    print(f"get_weather(city={city!r}, date={date!r})")
    return f"{city}, {date}: sunny, 21 degrees"


os.environ.setdefault("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
os.environ.setdefault("OPENAI_API_KEY", "none")
agent = ToolCallingAgent([get_weather], OpenAIModel("smollm-diffusion"), max_steps=3, verbosity_level=0)
# The library's own prompt has 1,278 tokens, several times as many as what the shipped model was trained on.
agent.prompt_templates["system_prompt"] = "Answer by calling tools."
print(agent.run("What is the weather in Lisbon?"))
