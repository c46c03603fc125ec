"""An agent's loop with the official openai client: `python examples/openai_client.py`.

The server says what to call; the function runs here, and its result goes back. Asks the server that OPENAI_BASE_URL
names, else the one that `python serve.py` starts. Needs `pip install openai`.
"""

import json
import os
from typing import Any

from openai import OpenAI

DATE = {"type": "string", "description": "Day as said by the user"}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}, "date": DATE}, "required": ["city"]}
TOOL: Any = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Weather of a place", "parameters": PARAMETERS},
}


def get_weather(city: str, date: str = "today") -> str:
    """Weather of a place; a real one would ask a service."""
    print(f"get_weather(city={city!r}, date={date!r})")
    return f"{city}, {date}: sunny, 21 degrees"


os.environ.setdefault("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1")
os.environ.setdefault("OPENAI_API_KEY", "none")
client = OpenAI()
messages: list[Any] = [{"role": "user", "content": "Will it rain in Berlin tomorrow?"}]
for choice in ("auto", "none"):  # a round that may call, and one that answers; more "auto" are more rounds of calls
    request: Any = {"model": "smollm-diffusion", "messages": messages, "tools": [TOOL], "tool_choice": choice}
    reply = client.chat.completions.create(**request).choices[0].message
    messages.append(reply)
    for call in reply.tool_calls or []:
        result = get_weather(**json.loads(call.function.arguments))
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
print(reply.content)
