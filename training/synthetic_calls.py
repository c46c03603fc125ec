"""Synthetic requests and the calls they ask for, covering every kind of value that a tool's schema may want.

Takes a count and a seed; gives records as `training.data` reads them (messages, tools, calls). Every value of a call is
said in the request, in words or digits; what is left out is not said. Tools, names, requests and values are put
together from the word lists below: no data set is read. Values that only another engine can guide are not made.

    python -m training.synthetic_calls --count 10000 --seed 0 --out synthetic_calls.jsonl.gz
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from pathlib import Path
from random import Random
from typing import Any, Literal, get_args

from tqdm import tqdm

from repo_package import load_repo_module

from .records import Record, write_records

scaffolds = load_repo_module("schema_scaffold")

Names = Literal["train", "dev"]

SOURCE = "synthetic_calls"

# ---------------------------------------------------------------------------------------------------------------------
# Words. Of each pair the first list makes training tools and the second the held-out ones.
# ---------------------------------------------------------------------------------------------------------------------


def _listed(words: str) -> tuple[str, ...]:
    return tuple(words.split(","))


# What a tool does -> (word in the name, ways to ask for it). Tools of one noun in one prompt differ in the sense.
VERBS: dict[str, dict[str, dict[str, tuple[str, ...]]]] = {
    "make": {
        "train": {"create": ("create", "set up"), "add": ("add", "put in"), "register": ("register", "enter")},
        "dev": {"compose": ("compose", "draw up"), "open": ("open", "start up")},
    },
    "remove": {
        "train": {"delete": ("delete", "get rid of"), "remove": ("remove", "take out")},
        "dev": {"discard": ("discard", "throw away"), "purge": ("purge", "wipe")},
    },
    "find": {
        "train": {"find": ("find", "look for"), "search": ("search for", "hunt for"), "lookup": ("look up", "dig up")},
        "dev": {"locate": ("locate", "track down"), "fetch": ("fetch", "pull up")},
    },
    "change": {
        "train": {"update": ("update", "change"), "edit": ("edit", "adjust"), "modify": ("modify", "rework")},
        "dev": {"revise": ("revise", "correct"), "amend": ("amend", "patch")},
    },
    "send": {
        "train": {"send": ("send", "send out"), "share": ("share", "pass on"), "forward": ("forward", "send along")},
        "dev": {"dispatch": ("dispatch", "send off"), "relay": ("relay", "hand over")},
    },
    "plan": {
        "train": {"schedule": ("schedule", "plan"), "book": ("book", "reserve")},
        "dev": {"arrange": ("arrange", "organise"), "allot": ("allot", "pencil in")},
    },
    "stop": {
        "train": {"cancel": ("cancel", "call off"), "pause": ("pause", "put on hold")},
        "dev": {"suspend": ("suspend", "freeze"), "abort": ("abort", "break off")},
    },
    "measure": {
        "train": {"estimate": ("estimate", "work out"), "compute": ("compute", "calculate")},
        "dev": {"appraise": ("appraise", "size up"), "gauge": ("gauge", "assess")},
    },
    "turn": {
        "train": {"convert": ("convert", "translate"), "export": ("export", "write out")},
        "dev": {"transform": ("transform", "recast"), "render": ("render", "produce a view of")},
    },
    "watch": {
        "train": {"monitor": ("monitor", "keep an eye on"), "track": ("track", "follow")},
        "dev": {"observe": ("observe", "watch over"), "supervise": ("supervise", "look after")},
    },
}

NOUNS: dict[str, tuple[str, ...]] = {
    "train": _listed(
        "invoice,parking permit,guest pass,loan offer,shift swap,team lunch,bug report,release note,backup job,"
        "mail filter,alarm rule,garden plan,recipe card,travel claim,gym course,pet record,repair order,rental car,"
        "hotel stay,train seat,concert ticket,museum tour,language lesson,exam slot,lab sample,blood test,vaccine dose,"
        "tax form,salary slip,bank transfer,gift card,coupon code,price alert,stock order,crypto wallet,budget line,"
        "photo album,video clip,podcast draft,playlist entry,news digest,blog post,forum thread,chat room,"
        "phone plan,data pipeline,server node,cloud bucket,code review,unit test,feature flag,access key,user role,"
        "sensor feed,heat pump,door lock,lamp scene,water meter,solar panel,charging spot,delivery slot,parcel label,"
        "warehouse bin,supply order,meal box,allergy note,fitness goal,sleep log,bike ride,hiking route,boat trip,"
        "weather alert,flood warning,traffic camera,bus line,toll bill,flight leg,luggage tag,visa request,"
        "contract clause,court date,survey sheet,poll question,job advert,interview round,training badge,"
        "meeting room,desk booking,printer queue,font file,map layer,image mask,audio track,text summary,"
        "chess match,quiz card,movie night,book loan,library fine,wedding list,birthday reminder,family tree"
    ),
    "dev": _listed(
        "orchard harvest,lighthouse vigil,ferry crossing,kiln firing,beehive inspection,tapestry loom,violin tuning,"
        "glacier trek,telescope session,greenhouse bed,aquarium tank,vineyard tasting,pottery class,ski lift,"
        "lantern parade,choir rehearsal,falcon perch,mosaic pattern,notary stamp,patent filing,cargo manifest,"
        "crane lift,drone mission,quarry load,reactor drill,subtitle cue,typeface proof,puppet show,sauna visit,"
        "tide chart"
    ),
}

# Kind -> what its parameters are called, for training and held out.
PARAMETERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "text": (("note", "message", "comment", "description", "caption", "footer text"), ("remark", "annotation")),
    "topic": (("topic", "query", "subject", "keyword", "theme"), ("motif", "search phrase")),
    "name": (
        ("customer name", "owner", "guest", "assignee", "contact person", "author", "manager", "driver"),
        ("supervisor", "referee", "caretaker"),
    ),
    "place": (("city", "location", "destination", "origin", "site", "pickup point"), ("harbour", "venue")),
    "email": (("email", "recipient email", "reply address", "billing email"), ("alert email", "mailbox")),
    "uri": (("link", "callback url", "source url", "website"), ("homepage", "feed url")),
    "uuid": (("account id", "session id", "request id", "device id"), ("trace id", "tenant id")),
    "ipv4": (("host ip", "server address", "gateway", "source ip"), ("proxy ip", "peer address")),
    "path": (("file path", "folder", "output file", "log file"), ("archive path", "target directory")),
    "phone": (("phone number", "mobile", "contact number", "emergency phone"), ("hotline", "fax number")),
    "code": (("order code", "reference code", "booking code", "item sku"), ("batch code", "voucher")),
    "date": (
        ("start date", "end date", "due date", "delivery date", "birth date", "expiry date"),
        ("arrival date", "audit date", "harvest date"),
    ),
    "date_words": (("day", "preferred day", "deadline"), ("weekday hint", "desired day")),
    "clock": (("start time", "end time", "pickup time", "alarm time"), ("opening time", "checkout time")),
    "time": (("sync time", "backup time", "cutoff time"), ("launch time", "poll time")),
    "date_time": (
        ("start moment", "end moment", "timestamp", "run moment"),
        ("firing moment", "log moment"),
    ),
    "duration": (("duration", "timeout", "interval", "retention"), ("cooldown", "grace period")),
    "duration_words": (("length", "waiting time", "stay length"), ("time span", "rehearsal length")),
    "integer": (
        ("count", "quantity", "limit", "priority", "page", "seats", "floor", "retries", "offset"),
        ("headcount", "tier", "batch size"),
    ),
    "number": (
        ("price", "amount", "weight", "distance", "budget", "rate", "temperature", "threshold", "balance"),
        ("altitude", "voltage", "tolerance"),
    ),
    "boolean": (
        ("dry run", "urgent mode", "notifications", "insurance", "encryption", "gift wrapping", "public access"),
        ("silent mode", "night shift", "caching"),
    ),
    "enum": (("status", "unit", "category", "level", "format", "mode", "color", "size"), ("grade", "finish")),
    "integer_enum": (("slot minutes", "resolution", "port", "zoom level"), ("frame rate", "bit depth")),
    "const": (("api version", "schema type", "channel"), ("protocol", "record type")),
    "union": (("ticket", "room", "target", "parent", "ceiling", "backup contact"), ("dock", "handle", "successor")),
    "array": (
        ("tags", "recipients", "values", "entries", "options", "choices", "exceptions"),
        ("markers", "readings", "picks"),
    ),
    "array_of_objects": (("items", "participants", "lines", "steps"), ("portions", "crew members")),
    "object": (("address", "settings", "profile", "filters", "payment", "details"), ("rigging", "permit holder")),
    "map": (("labels", "headers", "metadata", "variables"), ("annotations", "properties by name")),
    "tuple": (("coordinates", "window range", "grid cell"), ("anchor point", "tide range")),
}
KINDS = tuple(PARAMETERS)
SCALARS = tuple(kind for kind in KINDS if kind not in ("array", "array_of_objects", "object", "map", "tuple"))

_FIRST = _listed(
    "Anna,Björn,Chidi,Dolores,Emre,Fatima,Goran,Hana,Ines,Jasper,Kaia,Lucía,Mehmet,Nadia,Oksana,Pavel,Quentin,Rosa,"
    "Søren,Tamar,Ursula,Viktor,Wen,Ximena,Yusuf,Zoë,Liam,Mei,Priya,Tomás"
)
_LAST = _listed(
    "Abara,Berger,Castillo,Dvořák,Eriksen,Ferrante,Grimaldi,Haddad,Ivanova,Jansen,Kowalski,Lindqvist,Moreau,Nakata,"
    "O'Brien,Petrov,Quispe,Rossi,Šimek,Tanaka,Underhill,Vogel,Weiss,Yıldız,Zapata,van der Berg,McAllister"
)
_PLACES = _listed(
    "Lisbon,Tromsø,São Paulo,Kyoto,Nairobi,Reykjavík,Des Moines,Gdańsk,Hobart,Izmir,Málaga,New Haven,Port Louis,"
    "Québec,Saint-Étienne,Tbilisi,Ulm,Valparaíso,Winnipeg,Zürich,東京,Αθήνα,Львів,Leeds,Oslo,the north depot"
)
_ADJECTIVES = _listed("cheap,quiet,solar,vintage,waterproof,local,urgent,organic,second-hand,compact,spicy,medieval")
_THINGS = _listed(
    "running shoes,jazz records,roof tiles,noodle soup,bike locks,night trains,oak shelves,camping stoves,"
    "tax rules,beach houses,chess openings,laser printers,sourdough bread,street art"
)
_WORDS = _listed("alpha,north,blue,maple,river,delta,copper,orbit,cedar,violet,harbor,pixel,summit,ember,quartz")
_DOMAINS = _listed("example.org,example.com,mail.example.net,shop.example.com,lab.example.edu")
_ENDINGS = _listed("txt,csv,log,json,tar.gz,pdf")
_TEXTS = (
    "Bring {thing} to {place} please",
    'she said "{word}" and hung up',
    "Don't forget the {word} key",
    "copy C:\\{word}\\{word2} to D:\\",
    "match \\d+ in {word}",
    "10% off {thing}",
    "{word} → {word2} ✓",
    "café {word}, naïve {word2}",
    "line one: {word}\nline two: {word2}",
    "{word}\t{word2}",
    '{{"{word}": "{word2}"}}',
    'the sign reads "no {thing}" in {place}',
    "\x1b[1m{word}\x1b[0m",
    "thanks for the {thing} 🙂",
    "{word}/{word2} is over; ask {name}",
    "привет, {name}",
    "see you in {place}",
    "back\\slash {word}",
    "running {number} minutes late",
)
_ENUMS: tuple[tuple[str, ...], ...] = (
    ("low", "medium", "high"),
    ("draft", "published", "archived"),
    ("celsius", "fahrenheit", "kelvin"),
    ("ONE_WAY", "ROUND_TRIP", "MULTI_STOP"),
    ("red", "green", "blue", "dark_blue"),
    ("small", "large", "extra-large"),
    ("pdf", "csv", "xlsx"),
    ("Economy", "Premium", "Business"),
    ("notStarted", "inProgress", "done"),
    ("metric", "imperial"),
    ("north", "north-east", "south", "south-west"),
)
_INTEGER_ENUMS = ((15, 30, 45, 60), (1, 2, 4, 8), (80, 443, 8080), (240, 480, 720, 1080), (-1, 0, 1))
_CONSTS: tuple[Any, ...] = ("v2", "standard", 3, "web-form", True)
_MONTHS = _listed("January,February,March,April,May,June,July,August,September,October,November,December")
_ONES = _listed(
    "zero,one,two,three,four,five,six,seven,eight,nine,ten,eleven,twelve,thirteen,fourteen,fifteen,sixteen,"
    "seventeen,eighteen,nineteen"
)
_TENS = _listed("zero,ten,twenty,thirty,forty,fifty,sixty,seventy,eighty,ninety")
_DAY_WORDS = ("next Friday", "this weekend", "Monday morning", "the first of May", "tomorrow night", "in two weeks")
_LENGTH_WORDS = ("about an hour", "two and a half days", "a fortnight", "90 min", "three nights", "until lunch")

_OPENINGS = (
    "Please {ask}",
    "Could you {ask}?",
    "I need you to {ask}",
    "{Ask}",
    "Can you {ask}?",
    "I'd like to {ask}",
    "Help me {ask}",
    "Let's {ask}",
    "Hi, please {ask}",
    "Would you please {ask}?",
    "I want to {ask}",
    "hey can you {ask}?",
    "{ask}",
)
_NEXT_OPENINGS = ("Then {ask}", "Also, {ask}", "After that, please {ask}", "Next, {ask}", "And {ask}", "Finally {ask}")
_INLINE = (
    "with {p} {v}",
    "with {v} as the {p}",
    "using {v} for the {p}",
    "the {p} being {v}",
    "{p} {v}",
    "with the {p} set to {v}",
)
_SENTENCES = (
    "The {p} is {v}.",
    "Use {v} as the {p}.",
    "Set the {p} to {v}.",
    "The {p} should be {v}.",
    "For the {p}, take {v}.",
    "{P}: {v}.",
    "I want {v} as the {p}.",
    "As for the {p}, it's {v}.",
)
# Kinds that a preposition is enough for where the tool has no other parameter of the family.
_NATURAL: dict[str, tuple[str, tuple[str, ...]]] = {
    "date": ("day", ("on {v}", "dated {v}")),
    "date_words": ("day", ("{v}",)),
    "clock": ("hour", ("at {v}",)),
    "time": ("hour", ("at {v}",)),
    "date_time": ("hour", ("at {v}",)),
    "duration": ("length", ("for {v}",)),
    "duration_words": ("length", ("for {v}",)),
    "name": ("name", ("for {v}",)),
    "place": ("place", ("in {v}",)),
    "topic": ("topic", ("about {v}", "on {v}")),
}
_FAMILIES = {"date_time": ("hour", "day")}
# Said beside the request; no number or name in them belongs to a call.
_ASIDES = (
    "I already tried this {number} times, no luck.",
    "My colleague {name} says hello, by the way.",
    "Sorry for typos, this is coffee number {number}.",
    "I am writing this from gate B{number}.",
    "Ignore case {number}, that one is closed.",
    "{name} asked me about this, but is on leave now.",
    "My old phone had only {number} percent left.",
    "It has been raining here for {number} hours.",
    "Last year {name} used to do this for us.",
)
_CLOSINGS = ("Thanks!", "Thank you.", "That's all.", "Cheers", "Much appreciated.", "No rush.")

# ---------------------------------------------------------------------------------------------------------------------
# Values
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Said:
    """A value and how a request says it.

    Args:
        value: the JSON value.
        text: the value in words, digits or quotes.
        inline: a phrase that says it with its parameter, instead of the general ones.
        kinds: kinds of the values inside it.
        simple: whether a first wrong value may stand before it ("40, no, 50").
    """

    value: Any
    text: str
    inline: str = ""
    kinds: tuple[str, ...] = ()
    simple: bool = False


class _Dice(Random):
    """Draws for one example, and which word lists it may use."""

    def __init__(self, seed: str, names: Names) -> None:
        super().__init__(seed)
        self.names = names


class _Speaker:
    """Who asks: the day it is, and whether the request has to tell it."""

    def __init__(self, rng: Random) -> None:
        self.rng = rng
        self.today = date(2023, 1, 1) + timedelta(days=rng.randrange(1400))
        self.tells_today = False


Say = Callable[[_Speaker, str], Said]
"""Draws a value for a parameter that the request calls by the given words."""
Kind = tuple[Record, Say]


def _string(draw: Callable[[Random], str], simple: bool = False, **schema: Any) -> Kind:
    def say(speaker: _Speaker, words: str) -> Said:
        value = draw(speaker.rng)
        return Said(value, value, simple=simple)

    return {"type": "string", **schema}, say


def _draw_name(rng: Random) -> str:
    return rng.choice(_FIRST) + (f" {rng.choice(_LAST)}" if rng.random() < 0.75 else "")


def _draw_uuid(rng: Random) -> str:
    digits = f"{rng.getrandbits(128):032x}"
    return "-".join((digits[:8], digits[8:12], digits[12:16], digits[16:20], digits[20:]))


def _draw_email(rng: Random) -> str:
    return f"{rng.choice(_WORDS)}{rng.choice('._+-')}{rng.choice(_WORDS)}{rng.choice(('', '7', '42'))}@" + rng.choice(
        _DOMAINS
    )


def _draw_uri(rng: Random) -> str:
    query = rng.choice(("", f"?id={rng.randrange(1000)}", f"?q={rng.choice(_WORDS)}&page=2", "#top"))
    return f"{rng.choice(('https', 'http'))}://{rng.choice(_DOMAINS)}/{rng.choice(_WORDS)}/{rng.choice(_WORDS)}{query}"


def _draw_path(rng: Random) -> str:
    first, second, third = rng.sample(_WORDS, 3)
    ending = rng.choice(_ENDINGS)
    return rng.choice(
        (
            f"/var/{first}/{second}.{ending}",
            f"~/{first}/{second}-{third}.{ending}",
            f"C:\\Users\\{first}\\{second}.{ending}",
            f"./{first}_{second}.{ending}",
            f"\\\\{first}\\share\\{third}",
        )
    )


def _draw_phone(rng: Random) -> str:
    digits = [rng.randrange(100, 999), rng.randrange(100, 999), rng.randrange(1000, 9999)]
    shape = rng.choice(("+49 {} {} {}", "({}) {}-{}", "{}-{}-{}", "+1{}{}{}", "0{} {}{}"))
    return shape.format(*digits)


def _draw_code(rng: Random) -> str:
    return "".join(rng.choices("ABCDEFGHKLMNPQRSTUVWXYZ", k=3)) + f"-{rng.randrange(10000):04d}"


def _draw_text(rng: Random) -> str:
    first, second = rng.sample(_WORDS, 2)
    return rng.choice(_TEXTS).format(
        thing=rng.choice(_THINGS),
        place=rng.choice(_PLACES),
        word=first,
        word2=second,
        name=rng.choice(_FIRST),
        number=rng.randrange(3, 60),
    )


def _quoted(rng: Random, text: str) -> str:
    """The text between signs that it does not hold itself."""
    pairs = [pair for pair in ('""', "''", "“”", "«»") if not set(pair) & set(text)]
    pair = rng.choice(pairs)
    return f"{pair[0]}{text}{pair[1]}"


def _text(rng: _Dice) -> Kind:
    def say(speaker: _Speaker, words: str) -> Said:
        value = _draw_text(speaker.rng)
        return Said(value, _quoted(speaker.rng, value))

    return {"type": "string", **({"maxLength": 200} if rng.random() < 0.2 else {"minLength": 1})}, say


def number_words(value: int) -> str:
    """English words of a whole number from 0 to 99."""
    if value < 20:
        return _ONES[value]
    tens, ones = divmod(value, 10)
    return _TENS[tens] + (f"-{_ONES[ones]}" if ones else "")


def _say_number(rng: Random, value: int | float) -> str:
    """Digits, grouped digits or words."""
    size, sign = abs(value), ""
    if value < 0:
        sign = rng.choice(("-", "minus "))
    if isinstance(size, int):
        if size < 100 and rng.random() < 0.3:
            return ("minus " if sign else "") + number_words(size)
        if size >= 1_000_000 and size % 100_000 == 0 and rng.random() < 0.6:
            return f"{sign}{size / 1_000_000:g} million"
    grouped = size >= 1000 and rng.random() < 0.5
    return sign + (f"{size:,}" if grouped else str(size))


def _integer(rng: _Dice) -> Kind:
    low, high, extra = rng.choice(
        (
            (0, 20, {"minimum": 0}),
            (1, 100, {"minimum": 1, "maximum": 100}),
            (-50, 50, {}),
            (0, 9999, {}),
            (1, 40, {"exclusiveMinimum": 0}),
            (10_000, 5_000_000, {}),
            (-900_000, -1, {"maximum": -1}),
        )
    )
    step = rng.choice((1, 1, 1, 5)) if high <= 100 else 1
    if step > 1:
        extra = {**extra, "multipleOf": step}
    millions = high > 1_000_000

    def say(speaker: _Speaker, words: str) -> Said:
        value = speaker.rng.randint(-(-low // step), high // step) * step
        if extra.get("exclusiveMinimum") == value:
            value = step
        if millions and speaker.rng.random() < 0.3:
            value = speaker.rng.randint(10, 50) * 100_000
        return Said(value, _say_number(speaker.rng, value), simple=True)

    return {"type": "integer", **extra}, say


def _number(rng: _Dice) -> Kind:
    low, high, extra = rng.choice(
        ((0, 100, {"minimum": 0}), (-40, 40, {}), (0, 5000, {}), (-1, 1, {"minimum": -1, "maximum": 1}), (0, 10**7, {}))
    )

    def say(speaker: _Speaker, words: str) -> Said:
        digits = speaker.rng.choice((0, 1, 2, 2, 3))
        scaled = speaker.rng.randint(low * 10**digits, high * 10**digits)
        value: int | float = scaled // 10**digits if scaled % 10**digits == 0 else scaled / 10**digits
        text = _say_number(speaker.rng, value)
        if value >= 0 and words in ("price", "amount", "budget") and text[0].isdigit():
            text = speaker.rng.choice((f"${text}", f"{text} euros", text))
        return Said(value, text, simple=True)

    return {"type": "number", **extra}, say


def _boolean(rng: _Dice) -> Kind:
    def say(speaker: _Speaker, words: str) -> Said:
        value = speaker.rng.random() < 0.5
        on, off = speaker.rng.choice((("on", "off"), ("yes", "no"), ("true", "false"), ("enabled", "disabled")))
        inline = f"with {words} {'on' if value else 'off'}" if speaker.rng.random() < 0.5 else ""
        if speaker.rng.random() < 0.3:
            inline = f"with {words} please" if value else f"without {words}"
        return Said(value, on if value else off, inline)

    return {"type": "boolean"}, say


def _enum_words(value: str) -> str:
    """The member as one says it: `inProgress` and `IN_PROGRESS` are in progress."""
    spaced = "".join(f" {sign.lower()}" if sign.isupper() and not value.isupper() else sign for sign in value)
    return value if value.isupper() and "_" not in value else spaced.replace("_", " ").strip().lower()


def _enum(rng: _Dice) -> Kind:
    members = rng.choice(_ENUMS)

    def say(speaker: _Speaker, words: str) -> Said:
        value = speaker.rng.choice(members)
        return Said(value, speaker.rng.choice((value, _enum_words(value), _enum_words(value))))

    return {"type": "string", "enum": list(members)}, say


def _integer_enum(rng: _Dice) -> Kind:
    members = rng.choice(_INTEGER_ENUMS)

    def say(speaker: _Speaker, words: str) -> Said:
        value = speaker.rng.choice(members)
        return Said(value, _say_number(speaker.rng, value))

    return {"type": "integer", "enum": list(members)}, say


def _const(rng: _Dice) -> Kind:
    value = rng.choice(_CONSTS)
    return {"const": value}, lambda speaker, words: Said(value, json.dumps(value).strip('"'))


def _say_day(rng: Random, day: date) -> str:
    month, end = _MONTHS[day.month - 1], {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10, "th")
    end = "th" if 10 < day.day < 20 else end
    forms = [
        day.isoformat(),
        f"{day.day} {month} {day.year}",
        f"{month} {day.day}, {day.year}",
        f"{month} {day.day}{end}, {day.year}",
        f"the {day.day}{end} of {month} {day.year}",
        f"{month[:3]} {day.day} {day.year}",
        day.strftime("%Y/%m/%d"),
    ]
    return rng.choice(forms)


def _date(rng: _Dice) -> Kind:
    def say(speaker: _Speaker, words: str) -> Said:
        if speaker.rng.random() < 0.25:
            days, text = speaker.rng.choice(
                ((0, "today"), (1, "tomorrow"), (2, "the day after tomorrow"), (-1, "yesterday"), (0, ""))
            )
            if not text:
                days = speaker.rng.randint(2, 30)
                text = f"{_say_number(speaker.rng, days)} days from today"
            speaker.tells_today = True
            return Said((speaker.today + timedelta(days=days)).isoformat(), text)
        day = speaker.today + timedelta(days=speaker.rng.randint(-9000 if "birth" in words else -60, 400))
        return Said(day.isoformat(), _say_day(speaker.rng, day), simple=True)

    return {"type": "string", "format": "date"}, say


def _say_clock(rng: Random, hour: int, minute: int) -> str:
    half = f"{hour % 12 or 12}:{minute:02d} {'pm' if hour > 11 else 'am'}"
    forms = [f"{hour:02d}:{minute:02d}", half]
    if minute == 0:
        forms.append(half.replace(":00", ""))
        forms += {12: ["noon"], 0: ["midnight"]}.get(hour, [])
    if minute == 30 and 1 <= hour < 22:
        part = "morning" if hour < 12 else "afternoon" if hour < 18 else "evening"
        forms.append(f"half past {number_words(hour % 12 or 12)} in the {part}")
    return rng.choice(forms)


def _draw_clock(rng: Random) -> tuple[int, int]:
    return rng.randrange(24), rng.choice((0, 0, 30, 30, 15, 45, rng.randrange(60)))


def _clock(rng: _Dice) -> Kind:
    def say(speaker: _Speaker, words: str) -> Said:
        hour, minute = _draw_clock(speaker.rng)
        return Said(f"{hour:02d}:{minute:02d}", _say_clock(speaker.rng, hour, minute), simple=True)

    return {"type": "string", "pattern": "^([01][0-9]|2[0-3]):[0-5][0-9]$"}, say


def _time(rng: _Dice) -> Kind:
    def say(speaker: _Speaker, words: str) -> Said:
        hour, minute = _draw_clock(speaker.rng)
        return Said(f"{hour:02d}:{minute:02d}:00Z", f"{_say_clock(speaker.rng, hour, minute)} UTC", simple=True)

    return {"type": "string", "format": "time"}, say


def _date_time(rng: _Dice) -> Kind:
    zoned = rng.random() < 0.6
    schema = {"format": "date-time"} if zoned else {"pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}$"}

    def say(speaker: _Speaker, words: str) -> Said:
        day = speaker.today + timedelta(days=speaker.rng.randint(-30, 300))
        hour, minute = _draw_clock(speaker.rng)
        value = f"{day.isoformat()}T{hour:02d}:{minute:02d}" + (":00Z" if zoned else "")
        text = f"{_say_clock(speaker.rng, hour, minute)}{' UTC' if zoned else ''} on {_say_day(speaker.rng, day)}"
        return Said(value, speaker.rng.choice((text, text, value)))

    return {"type": "string", **schema}, say


def _duration(rng: _Dice) -> Kind:
    def say(speaker: _Speaker, words: str) -> Said:
        choose = speaker.rng
        few, more = choose.randint(2, 12), choose.choice((10, 15, 30, 45))
        amount = _say_number(choose, few)
        value, text = choose.choice(
            (
                (f"PT{few}H", f"{amount} hours"),
                (f"PT{few}H{more}M", f"{amount} hours and {more} minutes"),
                (f"PT{more}M", f"{_say_number(choose, more)} minutes"),
                ("PT1H", "one hour"),
                ("PT30M", "half an hour"),
                (f"P{few}D", f"{amount} days"),
                (f"P{few}W", f"{amount} weeks"),
                (f"PT{more}S", f"{more} seconds"),
                (f"P{few}DT{more}M", f"{amount} days and {more} minutes"),
            )
        )
        return Said(value, text, simple=True)

    return {"type": "string", "format": "duration"}, say


def _union(rng: _Dice) -> Kind:
    def nothing(speaker: _Speaker, words: str) -> Said:
        return Said(None, "none", inline=speaker.rng.choice((f"with no {words}", f"without any {words}")))

    branches: dict[str, Kind] = {
        "string": _string(_draw_code),
        "integer": _integer(rng),
        "number": _number(rng),
        "name": _string(_draw_name),
        "date": _date(rng),
        "null": ({"type": "null"}, nothing),
    }
    chosen = rng.choice(
        (
            ("string", "integer"),
            ("integer", "null"),
            ("name", "null"),
            ("string", "integer", "null"),
            ("date", "null"),
            ("number", "null"),
            ("integer", "name"),
        )
    )

    def say(speaker: _Speaker, words: str) -> Said:
        name = speaker.rng.choice(chosen)
        said = branches[name][1](speaker, words)
        return Said(said.value, said.text, said.inline, (f"union/{name}",))

    if chosen in (("integer", "null"), ("name", "null")) and rng.random() < 0.5:
        schema = branches[chosen[0]][0]
        return {**schema, "type": [schema["type"], "null"]}, say
    return {"anyOf": [branches[name][0] for name in chosen]}, say


# ---------------------------------------------------------------------------------------------------------------------
# Containers
# ---------------------------------------------------------------------------------------------------------------------

# What may stand in lists; free text and lists in lists would leave open where an item ends.
ITEMS = tuple(kind for kind in SCALARS if kind not in ("const", "union", "text", "date_words", "duration_words"))
FIELDS = tuple(kind for kind in SCALARS if kind not in ("const", "union", "boolean", "date_words", "duration_words"))


def _joined(rng: Random, texts: Sequence[str]) -> str:
    if len(texts) == 1:
        return texts[0]
    return ", ".join(texts[:-1]) + rng.choice((" and ", ", and ", ", ")) + texts[-1]


def _array(rng: _Dice) -> Kind:
    kind = rng.choice(ITEMS)
    item, say_item = _build(kind, rng)
    unique = kind in ("name", "email", "code", "place") and rng.random() < 0.4
    most = rng.choice((6, 6, 6, 4))
    least = rng.choice((0, 0, 0, 1))
    schema: Record = {"type": "array", "items": item}
    schema |= {"uniqueItems": True} if unique else {}
    schema |= {"maxItems": most} if most < 6 else {}
    schema |= {"minItems": least} if least else {}

    def say(speaker: _Speaker, words: str) -> Said:
        count = min(most, speaker.rng.choice((least, 1, 2, 2, 3, 3, 4, 5, 6)))
        items = [say_item(speaker, words) for _ in range(count)]
        if unique:
            items = list({json.dumps(said.value): said for said in items}.values())
        kinds = (f"array/{kind}", f"array of {len(items)}")
        if not items:
            inline = speaker.rng.choice((f"with no {words}", f"with an empty list of {words}"))
            return Said([], "an empty list", inline, kinds)
        texts = [said.text.replace(",", "") for said in items]
        return Said([said.value for said in items], _joined(speaker.rng, texts), kinds=kinds)

    return schema, say


def _tuple(rng: _Dice) -> Kind:
    first, say_first = _number(rng)
    second, say_second = rng.choice((_number, _integer))(rng)
    schema = {"type": "array", "prefixItems": [first, second], "items": False, "minItems": 2, "maxItems": 2}

    def say(speaker: _Speaker, words: str) -> Said:
        one, two = say_first(speaker, ""), say_second(speaker, "")
        return Said([one.value, two.value], f"{one.text} and {two.text}")

    return schema, say


def _object(rng: _Dice) -> Kind:
    return _object_of(rng, tuple(rng.sample(FIELDS, rng.randint(2, 3))), deep=rng.random() < 0.2)


def _object_of(rng: _Dice, kinds: Sequence[str], deep: bool = False) -> Kind:
    fields = [_field(kind, rng) for kind in kinds]
    if deep:
        words = rng.choice(PARAMETERS["object"][rng.names == "dev"])
        fields.append((words.replace(" ", "_"), words, "object", _object_of(rng, ("integer", "enum"))))
    must = {name for name, *_ in fields if rng.random() < 0.7}
    schema: Record = {"type": "object", "properties": {name: built[0] for name, _, _, built in fields}}
    schema |= {"required": sorted(must)} if must else {}
    schema |= {"additionalProperties": False} if rng.random() < 0.3 else {}

    def say(speaker: _Speaker, words: str) -> Said:
        chosen = [field for field in fields if field[0] in must or speaker.rng.random() < 0.6] or fields[:1]
        value, texts, kinds = {}, [], []
        for name, spoken, kind, (_, say_field) in chosen:
            said = say_field(speaker, spoken)
            value[name] = said.value
            text = f"({said.text})" if kind == "object" else said.text
            texts.append(speaker.rng.choice((f"{spoken} {text}", f"{text} as {spoken}")))
            kinds += [f"object/{kind}", *said.kinds]
        return Said(value, _joined(speaker.rng, texts), kinds=tuple(kinds))

    return schema, say


def _field(kind: str, rng: _Dice) -> tuple[str, str, str, Kind]:
    """(name, words, kind, schema and values) of a property of a nested object."""
    words = rng.choice(PARAMETERS[kind][rng.names == "dev"])
    return words.replace(" ", "_"), words, kind, _build(kind, rng)


def _array_of_objects(rng: _Dice) -> Kind:
    item, say_item = _object_of(
        rng, rng.choice((("name", "integer"), ("code", "number"), ("topic", "integer", "enum")))
    )

    def say(speaker: _Speaker, words: str) -> Said:
        items = [say_item(speaker, words) for _ in range(speaker.rng.randint(1, 3))]
        lead = speaker.rng.choice(("one with ", "one: "))
        text = "; ".join(f"{lead if index == 0 else 'another with '}{said.text}" for index, said in enumerate(items))
        kinds = tuple(kind for said in items for kind in said.kinds)
        return Said([said.value for said in items], text, kinds=(*kinds, f"array of {len(items)}"))

    return {"type": "array", "items": item, "minItems": 1}, say


def _map(rng: _Dice) -> Kind:
    kind = rng.choice(("topic", "integer", "code", "enum"))
    item, say_item = _build(kind, rng)

    def say(speaker: _Speaker, words: str) -> Said:
        keys = speaker.rng.sample(_WORDS, speaker.rng.randint(1, 3))
        saids = [say_item(speaker, words) for _ in keys]
        sign = speaker.rng.choice((" = ", " as ", ": "))
        texts = [f"{key}{sign}{said.text}" for key, said in zip(keys, saids, strict=True)]
        value = {key: said.value for key, said in zip(keys, saids, strict=True)}
        return Said(value, _joined(speaker.rng, texts), kinds=(f"map/{kind}",))

    return {"type": "object", "additionalProperties": item}, say


_BUILDERS: dict[str, Callable[[_Dice], Kind]] = {
    "text": _text,
    "topic": lambda rng: _string(lambda draw: f"{draw.choice(_ADJECTIVES)} {draw.choice(_THINGS)}", maxLength=80),
    "name": lambda rng: _string(_draw_name, simple=True),
    "place": lambda rng: _string(lambda draw: draw.choice(_PLACES), simple=True),
    "email": lambda rng: _string(_draw_email, format="email"),
    "uri": lambda rng: _string(_draw_uri, format="uri"),
    "uuid": lambda rng: _string(_draw_uuid, format="uuid"),
    "ipv4": lambda rng: _string(lambda draw: ".".join(str(draw.randrange(256)) for _ in range(4)), format="ipv4"),
    "path": lambda rng: _string(_draw_path),
    "phone": lambda rng: _string(_draw_phone),
    "code": lambda rng: _string(_draw_code, pattern="^[A-Z]{3}-[0-9]{4}$"),
    "date": _date,
    "date_words": lambda rng: _string(lambda draw: draw.choice(_DAY_WORDS)),
    "clock": _clock,
    "time": _time,
    "date_time": _date_time,
    "duration": _duration,
    "duration_words": lambda rng: _string(lambda draw: draw.choice(_LENGTH_WORDS)),
    "integer": _integer,
    "number": _number,
    "boolean": _boolean,
    "enum": _enum,
    "integer_enum": _integer_enum,
    "const": _const,
    "union": _union,
    "array": _array,
    "array_of_objects": _array_of_objects,
    "object": _object,
    "map": _map,
    "tuple": _tuple,
}
_HINTS = {
    "date": "as YYYY-MM-DD",
    "clock": "as HH:MM, 24 hours",
    "time": "in UTC, HH:MM:SSZ",
    "date_time": "in ISO 8601",
    "duration": "as an ISO 8601 duration",
    "date_words": "in the user's words",
    "duration_words": "in the user's words",
    "path": "as written by the user",
    "code": "like ABC-1234",
}


def _build(kind: str, rng: _Dice) -> Kind:
    return _BUILDERS[kind](rng)


# ---------------------------------------------------------------------------------------------------------------------
# Tools
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Parameter:
    name: str
    words: str
    kind: str
    schema: Record
    say: Say
    required: bool


@dataclass(frozen=True)
class _Tool:
    sense: str
    verb: str
    noun: str
    name: str
    style: str
    parameters: tuple[_Parameter, ...]
    described: bool

    def openai(self) -> Record:
        """The tool as a prompt shows it."""
        schema: Record = {"type": "object", "properties": {one.name: one.schema for one in self.parameters}}
        required = [one.name for one in self.parameters if one.required]
        schema |= {"required": required} if required else {}
        text = f"{self.verb.capitalize()} {_article(self.noun)} {self.noun}"
        described = {"description": text} if self.described else {}
        return {"type": "function", "function": {"name": self.name, **described, "parameters": schema}}


def _article(noun: str) -> str:
    return "an" if noun[0] in "aeiou" and not noun.startswith(("unit", "user")) else "a"


def _in_style(words: Sequence[str], style: str) -> str:
    if style == "snake":
        return "_".join(words)
    if style == "kebab":
        return "-".join(words)
    return "".join(word.capitalize() if index or style == "pascal" else word for index, word in enumerate(words))


def _make_tool(
    rng: _Dice, sense: str = "", noun: str = "", style: str = "", shared: Sequence[_Parameter] = ()
) -> _Tool:
    """A tool, of the given sense or noun, with some of another's parameters."""
    sense = sense or rng.choice(list(VERBS))
    noun = noun or rng.choice(NOUNS[rng.names])
    verb = rng.choice(list(VERBS[sense][rng.names]))
    style = style or rng.choice(("snake", "snake", "snake", "camel", "camel", "pascal", "kebab", "dotted"))
    parts = noun.split()
    name = f"{'_'.join(parts)}.{verb}" if style == "dotted" else _in_style([verb, *parts], style)
    described = rng.random() < 0.9
    count = rng.choice((0, 1, 1, 2, 2, 2, 3, 3, 4, 5)) if not shared else rng.randint(0, 2)
    parameters = list(shared)
    for kind in rng.choices(KINDS, _WEIGHTS, k=count):
        words = rng.choice(PARAMETERS[kind][rng.names == "dev"])
        name_of = _in_style(words.split(), "camel" if style in ("camel", "pascal") else "snake")
        if all(one.name.lower().replace("_", "") != name_of.lower().replace("_", "") for one in parameters):
            parameters.append(_make_parameter(rng, kind, words, name_of, described))
    return _Tool(sense, verb, noun, name, style, tuple(parameters), described)


# Containers and unions are many in themselves, and so is each scalar kind inside them.
_OFTEN = {"array": 4.0, "union": 3.0, "object": 2.0, "text": 2.0, "integer": 2.0, "number": 2.0, "date": 2.0}
_WEIGHTS = [_OFTEN.get(kind, 1.0) for kind in KINDS]


def _make_parameter(rng: _Dice, kind: str, words: str, name: str, described: bool) -> _Parameter:
    schema, say = _build(kind, rng)
    required = rng.random() < 0.55
    if described and rng.random() < 0.75:
        text = f"{words.capitalize()}{', ' + _HINTS[kind] if kind in _HINTS else ''}"
        schema = {**schema, "description": text}
    if not required and kind in ("integer", "enum", "boolean", "integer_enum") and rng.random() < 0.5:
        schema = {**schema, "default": say(_Speaker(rng), words).value}
    return _Parameter(name, words, kind, schema, say, required)


def _distractors(rng: _Dice, tool: _Tool, count: int) -> list[_Tool]:
    """Other tools: of the same noun, of the same verb, or with the same parameters; never one that fits as well."""
    found: list[_Tool] = []
    while len(found) < count:
        senses = [sense for sense in VERBS if sense != tool.sense]
        shared = rng.sample(tool.parameters, rng.randint(0, len(tool.parameters)))
        likeness = rng.random()
        if likeness < 0.4:
            other = _make_tool(rng, rng.choice(senses), tool.noun, tool.style, shared)
        elif likeness < 0.7:
            other = _make_tool(rng, tool.sense, "", tool.style, shared)
        else:
            other = _make_tool(rng, style=tool.style)
        if all((other.sense, other.noun) != (one.sense, one.noun) for one in (tool, *found)):
            found.append(other)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Requests
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Example:
    """A record and what is in it.

    Args:
        record: as `training.data` reads it.
        asked: names of the tools that it asks for, whether they are shown or not.
        counts: how often each kind of value, and each decision about a structure, is in its calls.
    """

    record: Record
    asked: list[str]
    counts: Counter[str] = field(default_factory=Counter)


def _fact(rng: _Dice, one: _Parameter, said: Said, natural: bool, sentence: bool) -> str:
    """A phrase or a sentence that says one value."""
    text = said.text
    if said.inline and not sentence:
        return said.inline
    if said.inline:
        return f"I want it {said.inline}."
    if natural and not sentence and rng.random() < 0.6:
        return rng.choice(_NATURAL[one.kind][1]).format(v=text)
    form = rng.choice(_SENTENCES if sentence else _INLINE)
    if one.words.endswith("s") and not one.words.endswith("ss"):
        form = form.replace(" is {v}", " are {v}").replace("it's", "they are")
    return form.replace("{p}", one.words).replace("{P}", one.words.capitalize()).replace("{v}", text)


def _correct(speaker: _Speaker, one: _Parameter, said: Said) -> Said:
    """Now and then, the value behind one that is taken back at once."""
    if not said.simple or speaker.rng.random() >= 0.04:
        return said
    other = one.say(speaker, one.words)
    if other.value == said.value or other.inline or not other.simple:
        return said
    back = speaker.rng.choice(("no wait,", "sorry, I mean", "or rather"))
    return Said(said.value, f"{other.text}, {back} {said.text}")


def _ask(rng: _Dice, tool: _Tool, opening: str) -> tuple[str, bool]:
    way = rng.choice(VERBS[tool.sense][rng.names][tool.verb])
    asked = f"{way} {rng.choice((_article(tool.noun), 'the', 'my'))} {tool.noun}"
    question = opening.endswith("?")
    return opening.removesuffix("?").format(ask=asked, Ask=asked[0].upper() + asked[1:]), question


def _request(speaker: _Speaker, rng: _Dice, tool: _Tool, opening: str, counts: Counter[str]) -> tuple[str, Record]:
    """One request for a tool, and its arguments in schema order; an optional value's null is its absence."""
    arguments: Record = {}
    facts: list[tuple[_Parameter, Said]] = []
    for one in tool.parameters:
        if not one.required and rng.random() < 0.5:
            counts["left out, has a default" if "default" in one.schema else "left out"] += 1
            continue
        said = one.say(speaker, one.words)
        if said.value is not None or one.required:
            arguments[one.name] = said.value
        counts.update((one.kind, *said.kinds, *(() if one.required else ("optional, said",))))
        if one.kind != "const" or not one.required or rng.random() < 0.3:
            facts.append((one, _correct(speaker, one, said)))
    # What is left out counts too: a bare "on Friday" must not fit a second date.
    families = Counter(name for one in tool.parameters for name in _families(one.kind))
    rng.shuffle(facts)
    lead, question = _ask(rng, tool, opening)
    style = rng.choices(("prose", "phrases", "list"), (0.65, 0.2, 0.15))[0]
    inline = 0 if style == "list" else len(facts) if style == "phrases" else rng.randint(0, min(2, len(facts)))
    phrases = [
        _fact(rng, one, said, all(families[name] == 1 for name in _families(one.kind)) and one.kind in _NATURAL, False)
        for one, said in facts[:inline]
    ]
    if phrases:
        lead = f"{lead} {_joined(rng, phrases)}"
    end = "?" if question else ":" if style == "list" and facts else "."
    if style == "list" and facts:
        sign = rng.choice(("- ", "* ", ""))
        lines = [f"\n{sign}{one.words}: {said.text}" for one, said in facts]
        return lead + end + "".join(lines), arguments
    sentences = [_fact(rng, one, said, False, True) for one, said in facts[inline:]]
    return " ".join((lead + end, *sentences)), arguments


def _families(kind: str) -> tuple[str, ...]:
    return _FAMILIES.get(kind) or ((_NATURAL[kind][0],) if kind in _NATURAL else ())


def example(index: int, seed: int, names: Names = "train") -> Example:
    """The example of a number: the same wherever it is made.

    Args:
        index: its number.
        seed: of all examples.
        names: which word lists name tools and parameters; the two share no tool, verb, noun or parameter.
    """
    rng = _Dice(f"{names}/{seed}/{index}", names)
    speaker = _Speaker(rng)
    counts = Counter[str]()
    tool = _make_tool(rng)
    style = rng.choices(("one", "same tool", "two tools", "none"), (0.72, 0.07, 0.09, 0.12))[0]
    others = _distractors(rng, tool, rng.randint(style in ("two tools", "none"), 3))
    asked = {"same tool": [tool] * rng.randint(2, 3), "two tools": [tool, *others[:1]]}.get(style, [tool])
    texts, calls = list[str](), list[Record]()
    for number, one in enumerate(asked):
        opening = rng.choice(_NEXT_OPENINGS if number else _OPENINGS)
        own = Counter[str]()
        text, arguments = _request(speaker, rng, one, opening, own)
        call = {"name": one.name, "arguments": arguments}
        if call not in calls:
            texts.append(text)
            calls.append(call)
            counts.update(own if style != "none" else ())
    style = "one" if style == "same tool" and len(calls) == 1 else style
    shown = others if style == "none" else [tool, *others]
    rng.shuffle(shown)
    counts.update((f"calls: {style}", f"tools: {len(shown)}"))
    record = {
        "id": f"{SOURCE}-{names}-{seed}-{index}",
        "source": SOURCE,
        "license": "Apache-2.0",
        "messages": [{"role": "user", "content": _framed(speaker, rng, "\n".join(texts))}],
        "tools": [one.openai() for one in shown],
        "calls": [] if style == "none" else calls,
    }
    return Example(record, [one.name for one in asked], counts)


def _framed(speaker: _Speaker, rng: _Dice, text: str) -> str:
    """The request with the day where it needs it, with asides and thanks."""
    before = [speaker.today.strftime("Today is %Y-%m-%d.")] if speaker.tells_today else []
    after = list[str]()
    if rng.random() < 0.25:
        aside = rng.choice(_ASIDES).format(number=rng.randint(2, 90), name=rng.choice(_FIRST))
        (before if rng.random() < 0.6 else after).append(aside)
    if rng.random() < 0.2:
        after.append(rng.choice(_CLOSINGS))
    gap = "\n" if "\n" in text else " "
    return " ".join(before) + (" " if before else "") + text + (gap if after else "") + " ".join(after)


def generate(count: int, seed: int, names: Names = "train", start: int = 0) -> Iterator[Record]:
    """Records of synthetic requests; several processes share the work by different `start`.

    Args:
        count: how many.
        seed: of all draws; together with the number of a record it decides on it alone.
        names: which word lists name tools and parameters.
        start: number of the first one.

    Yields:
        Records as `training.data` reads them.
    """
    for index in range(start, start + count):
        yield example(index, seed, names).record


def check_record(record: Record) -> None:
    """See that all tools compile and all calls go through their scaffolds.

    Raises:
        ValueError: one does not; the message names the record and the tool.
    """
    tools = {tool["function"]["name"]: tool for tool in record["tools"]}
    try:
        compiled = {name: scaffolds.compile_scaffold(tool) for name, tool in tools.items()}
        for call in record["calls"]:
            segments = scaffolds.argument_segments(compiled[call["name"]], call["arguments"])
            if "".join(segments) != json.dumps(call["arguments"], ensure_ascii=False):
                raise ValueError(f"the arguments of {call['name']} are not in schema order.")
    except (ValueError, KeyError) as error:
        raise ValueError(f"{record['id']}: {error} Correct the kind that made it in {Path(__file__).name}.") from error


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000, help="how many records")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first record")
    parser.add_argument("--names", choices=get_args(Names), default="train", help="which word lists name the tools")
    parser.add_argument("--out", type=Path, required=True, help="gzipped JSONL file")
    options = parser.parse_args(arguments)
    if options.count < 1:
        parser.error("--count is the number of records: give 1 or more.")
    counts, names = Counter[str](), set[str]()

    def made() -> Iterator[Record]:
        for index in tqdm(range(options.start, options.start + options.count), "synthetic calls", unit="record"):
            one = example(index, options.seed, options.names)
            check_record(one.record)
            counts.update(one.counts)
            names.update(tool["function"]["name"] for tool in one.record["tools"])
            yield one.record

    write_records(options.out, made())
    for name, number in sorted(counts.items()):
        print(f"{name:28} {number:8}")
    print(f"{options.count} records, {len(names)} tool names -> {options.out}")


if __name__ == "__main__":
    main()
