"""Records of one request about one of eight cities, with three tools, for tests of training data."""

from typing import Any

from training.records import Record

DESCRIPTIONS = {
    "get_weather": "Sunshine and rain of the coming days",
    "find_hotel": "Rooms for the night, with breakfast",
    "play_music": "Songs and albums over the loudspeaker",
}
CITIES = ["Paris", "Rome", "Oslo", "Lima", "Cairo", "Quito", "Bern", "Delhi"]


def tool(name: str) -> Record:
    parameters = {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "The city that is asked about"}},
        "required": ["city"],
    }
    function = {"name": name, "description": DESCRIPTIONS.get(name, "Something else"), "parameters": parameters}
    return {"type": "function", "function": function}


def record(index: int, **fields: Any) -> Record:
    city = CITIES[index % len(CITIES)]
    return {
        "id": f"r{index}",
        "source": "tiny",
        "messages": [{"role": "user", "content": f"Weather number {index} in {city}?"}],
        "tools": [tool("get_weather"), tool("find_hotel"), tool("play_music")],
        "calls": [{"name": "get_weather", "arguments": {"city": city}}],
        **fields,
    }
