"""The assistant's language: functions, phrasings, and how one request is drawn.

A phrasing is a line with alternatives ``(a|b|)`` and slots ``{room}``; `phrasings` expands it to flat
templates. Phrasings and argument combinations are split by hash into *train* and *test*, so that what the
test asks was never shown: `draw` takes the side. Knows nothing of noise in the pool or of files.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from random import Random

from profiles.quickstart.slots import SLOTS, Value, convertible

TEST_SHARE = 8  # one in so many phrasings, and one in so many argument combinations, is kept for the test

# function -> argument names in the order of the call
FUNCTIONS: dict[str, tuple[str, ...]] = {
    "set_light": ("room", "level"),
    "switch_light": ("room", "state"),
    "set_color": ("room", "color"),
    "set_temperature": ("room", "degrees"),
    "set_timer": ("minutes", "label"),
    "set_alarm": ("time", "day"),
    "play_music": ("genre", "artist", "room"),
    "set_volume": ("level",),
    "skip_track": ("direction",),
    "send_message": ("contact", "text"),
    "call_contact": ("contact",),
    "add_item": ("item", "list"),
    "get_weather": ("city", "day"),
    "navigate": ("destination", "mode"),
    "create_event": ("title", "day", "time"),
    "convert_units": ("value", "from", "to"),
    "lock_door": ("door", "action"),
}
OUT_OF_SCOPE = "none"

PHRASINGS: dict[str, list[str]] = {
    "set_light": [
        "(dim|set|turn|bring|put|adjust|change) (the|my|) {room} (lights|light|lamp|lighting) "
        "(to|down to|up to) {level}(| percent)",
        "(make|set) the (lights|lamp|light) in the {room} {level} percent( bright|)",
        "{room} (lights|lamp|light) (to|at) {level}(| percent)",
        "(i want|i need|give me) {level} percent (light|brightness) in the {room}",
        "(brightness|light level) (in|of) the {room} (to|should be) {level}(| percent)",
    ],
    "switch_light": [
        "(turn|switch|flip) {state} (the|my|) {room} (lights|light|lamp)",
        "(turn|switch|flip) (the|my|) {room} (lights|light|lamp) {state}",
        "{room} (lights|light|lamp) {state}",
        "(turn|switch) {state} the (lights|light|lamp) in the {room}",
        "(get|have) the {room} (lights|lamp) {state}",
    ],
    "set_color": [
        "(make|turn|set|change) the {room} (lights|light|lamp) (to |){color}",
        "(i want|give me|i need) {color} (light|lights) in the {room}",
        "(color|colour) the {room} (lights|lamp|light) {color}",
        "(switch|change) the (color|colour) (in|of) the {room} to {color}",
        "{color} (light|lights|glow) (in|for) the {room}",
    ],
    "set_temperature": [
        "(set|turn|put|bring|change) the {room} (thermostat|heating|temperature|heat) to {degrees}(| degrees)",
        "(make|keep|get) (it|the air) {degrees} degrees in the {room}",
        "(heat|warm|cool) the {room} to {degrees}(| degrees)",
        "{room} (temperature|thermostat|heating) {degrees}(| degrees)",
        "(i want|i need) the {room} at {degrees} degrees",
    ],
    "set_timer": [
        "(set|start|begin|make) a timer for {minutes} (minutes|mins|min)(| for the {label}| for {label})",
        "(set|start|begin|make) a {minutes} minute (timer|countdown)(| for the {label}| for {label})",
        "(count down|countdown|time me for) {minutes} (minutes|mins)",
        "{label} timer (for|of) {minutes} (minutes|mins)",
        "(remind|ping|buzz) me in {minutes} minutes(| about the {label})",
        "timer {minutes} (minutes|mins|min)",
    ],
    "set_alarm": [
        "(set|make|put|create) an alarm (for|at) {time}(| on {day}| {day})",
        "(wake me|get me) up at {time}(| on {day}| {day})",
        "(i need|i want|i have) to (be up|wake up|get up) at {time}(| on {day}| {day})",
        "alarm (for|at) {time}(| on {day}| {day})",
        "{day} alarm (at|for) {time}",
    ],
    "play_music": [
        "(play|put on|start) (some|a little|) {genre}( music|)(| in the {room})",
        "(play|put on|start) (something|songs|music|a song) by {artist}(| in the {room})",
        "(i want|i would like|i feel like) to (hear|listen to) (some {genre}|{artist})(| in the {room})",
        "(let us|let me) (hear|listen to) ({genre} music|{artist})(| in the {room})",
        "{genre} music (please|now)(| in the {room})",
    ],
    "set_volume": [
        "(set|turn|put|change|bring) the (volume|sound) (to|down to|up to) {level}(| percent)",
        "(volume|sound) (to|at) {level}(| percent)",
        "(make|have) the (volume|sound|music) {level} percent( loud|)",
        "(i want|give me) the (volume|sound) at {level}(| percent)",
    ],
    "skip_track": [
        "(play|go to|skip to|jump to|give me) the {direction} (song|track|tune)",
        "{direction} (song|track|tune)",
        "(put on|start) the {direction} (song|track|one)",
        "(i want|let us hear) the {direction} (song|track|one)",
    ],
    "send_message": [
        "(text|message|tell) {contact} (that |){text}",
        "(send|write) (a message|a text|a note) to {contact} (saying|that says) {text}",
        "(send|write) {contact} a (message|text|note) (saying|that says|with) {text}",
        "let {contact} know (that |){text}",
        "message (to|for) {contact} {text}",
    ],
    "call_contact": [
        "(call|phone|ring|dial) {contact}(| up| now)",
        "(make|place|start) a (call|phone call|video call) (to|with) {contact}",
        "(get|put) {contact} on the (phone|line)",
        "(i want|i need|i have) to (talk|speak) (to|with) {contact}",
        "give {contact} a (call|ring)",
    ],
    "add_item": [
        "(add|put) {item} (to|on) (the|my) {list} list",
        "(write|note) {item} (down |)on (the|my) {list} list",
        "(we need|i need|we want|remember) {item} (on|for) the {list} list",
        "{list} list (add|plus) {item}",
        "(the|my) {list} list (needs|should have) {item}",
    ],
    "get_weather": [
        "(what is|how is|tell me|check) the (weather|forecast) (in|for) {city}(| on {day}| {day})",
        "(will it|is it going to|does it) (rain|snow|be sunny|be windy) in {city}(| on {day}| {day})",
        "(weather|forecast) (in|for) {city}(| on {day}| {day})",
        "(do i need|should i take) (an umbrella|a coat) in {city}(| on {day}| {day})",
        "{day} (weather|forecast) (in|for) {city}",
    ],
    "navigate": [
        "(take|guide|bring|navigate|lead) me to {destination}(| {mode})",
        "(directions|route|way|navigate) to {destination}(| {mode})",
        "(how do i|how can i) (get|go) to {destination}(| {mode})",
        "(i want|i need|i have) to (go|get) to {destination}(| {mode})",
        "(find|show me) the (way|route|best way) to {destination}(| {mode})",
    ],
    "create_event": [
        "(add|put|schedule|book|create) (a|my|the) {title} (on|for) {day} at {time}",
        "(schedule|book|plan) {title} {day} at {time}",
        "(i have|there is) (a|my) {title} (on {day}|{day}) at {time}",
        "(put|add) {title} (in|on|into) (my|the) calendar (for|on) {day} at {time}",
        "calendar {title} {day} {time}",
    ],
    "convert_units": [
        "(convert|change|turn) {value} {from} (to|into) {to}",
        "(what is|how much is) {value} {from} in {to}",
        "how many {to} (is|are|in|make) {value} {from}",
        "{value} {from} (to|in|as) {to}",
        "(give me|tell me|show me) {value} {from} in {to}",
    ],
    "lock_door": [
        "{action} the {door}(| now| for me)",
        "(make sure to|go and|quickly) {action} the {door}",
        "(i want|i need) (you to |to ){action} the {door}",
        "(can someone|somebody) {action} the {door}",
        "the {door} {action} it",
    ],
    OUT_OF_SCOPE: [
        "(what|who|where|why) (is|was|are) (the|a) (capital of {city}|tallest mountain|best movie|oldest king)",
        "(tell|give) me (a joke|a story|a riddle|a fun fact|a poem)(| about {city}| about {item})",
        "(order|buy|get) (me |)(a pizza|some sushi|a taxi|new shoes|two tickets)(| for {day}| to {city})",
        "book (a flight|a hotel|a table)(| to {city}| in {city}) (on|for) {day}",
        "(who|what) (invented|discovered|made) (the |)(alarm|lamp|telephone|radio|thermometer)",
        "(do you|did you ever) (like|love|hate|enjoy) ({genre}|{item}|{city}|the {room})",
        "i (called|texted|met|saw) {contact} (yesterday|last week|this morning)",
        "(the|my) {room} (is|looks) (nice|messy|huge|cold) (today|now|again)",
        "(translate|spell|define|pronounce) the word {item}(| in french| for me)",
        "what is {level} (times|plus|minus) {minutes}",
        "how (old|tall|rich|clever) (is|are) ({contact}|{artist}|you)",
        "(i am|we are) (tired|bored|hungry|happy|sad)(| today| in {city})",
        "(write|draft|read) (an essay|a poem|the news|my email)(| about {city}| to {contact})",
        "(what|which) (color|colour|song|city) do you (like|prefer)",
        "(thanks|thank you|good morning|good night|hello|bye)(| {contact}| friend)",
        "(why|when) did {contact} (leave|move to {city}|buy {item})",
        "(is|was) {city} (bigger|older|nicer) than {city}",
        "(delete|cancel|forget) (my|the|every) (photos|files|account|backup)",
    ],
}

# Two to 32 combinations are too few to keep some back: these are split by their phrasing alone.
SPLIT_BY_PHRASING = frozenset({OUT_OF_SCOPE, "skip_track", "lock_door", "switch_light"})

PREFIXES = ["", "", "", "", "please ", "hey ", "can you ", "could you ", "would you ", "ok ", "hi there ", "so "]
PREFIXES += ["pls ", "yo ", "kindly ", "assistant ", "quick "]
SUFFIXES = ["", "", "", "", "", " please", " thanks", " pls", " mate", " for me please", " asap", " ok"]
DIALECT = {"going to": "gonna", "want to": "wanna", "you": "ya", "give me": "gimme", "let me": "lemme"}
DIALECT |= {"the": "da", "something": "sumthin", "minutes": "mins", "are": "r", "what is": "wots", "please": "plz"}
FLOURISH = re.compile(r"\(([^()]*)\)")
SLOT = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class Request:
    """One utterance with its call; ``phrasing`` and ``combination`` are what the split is made on."""

    utterance: str
    call: str
    function: str
    phrasing: str
    combination: str


def expand(line: str) -> list[str]:
    """Every flat template of a phrasing line, single-spaced, in order."""
    parts = FLOURISH.split(line)
    options = [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)]
    return [" ".join("".join(picked).split()) for picked in product(*options)]


def held_out(kind: str, text: str) -> bool:
    """Whether a phrasing or an argument combination belongs to the test side; a pure function of its text."""
    return int.from_bytes(hashlib.sha256(f"{kind}:{text}".encode()).digest()[:4], "big") % TEST_SHARE == 0


@lru_cache(maxsize=64)
def phrasings(function: str, test: bool) -> tuple[tuple[str, ...], ...]:
    """The flat templates of one side, grouped by line, so that long lines do not drown short ones."""
    groups = [tuple(t for t in expand(line) if held_out("phrasing", t) == test) for line in PHRASINGS[function]]
    return tuple(g for g in groups if g)


def call_json(function: str, args: dict[str, Value]) -> str:
    """The call as compact JSON, arguments in the order of `FUNCTIONS`."""
    if function == OUT_OF_SCOPE:
        return json.dumps({"name": OUT_OF_SCOPE}, separators=(",", ":"))
    ordered = {name: args[name] for name in FUNCTIONS[function] if name in args}
    return json.dumps({"name": function, "args": ordered}, separators=(",", ":"))


def typo(word: str, rng: Random) -> str:
    """One slip of the finger: swap, drop or double a letter inside the word."""
    at = rng.randrange(1, len(word) - 1)
    kind = rng.randrange(3)
    if kind == 0:
        return word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return word[:at] + word[at + 1 :] if kind == 1 else word[:at] + word[at] + word[at:]


def colour_template(template: str, rng: Random) -> str:
    """Dialect and typing noise on the words of a template, never inside a slot."""
    if rng.random() < 0.12:
        for plain, said in DIALECT.items():
            if rng.random() < 0.5:
                template = re.sub(rf"(?<![{{\w]){plain}(?![\w}}])", said, template)
    if rng.random() < 0.12:
        tokens = template.split(" ")
        long = [i for i, w in enumerate(tokens) if len(w) >= 4 and w.isalpha()]
        if long:
            i = rng.choice(long)
            tokens[i] = typo(tokens[i], rng)
            template = " ".join(tokens)
    return template


def draw(function: str, rng: Random, *, test: bool) -> Request:
    """One request of ``function`` from one side of the split.

    On the test side the phrasing is held out, and so is the combination of two or more arguments, but for
    `SPLIT_BY_PHRASING`; a lone argument is no combination.
    """
    template = rng.choice(rng.choice(phrasings(function, test)))
    names = list(dict.fromkeys(SLOT.findall(template)))
    for _ in range(10_000):
        drawn = {name: SLOTS[name](rng) for name in names}
        if "from" in drawn and not convertible(str(drawn["from"][0]), str(drawn["to"][0])):
            continue
        call = call_json(function, {name: value for name, (value, _) in drawn.items()})
        if len(names) < 2 or function in SPLIT_BY_PHRASING or held_out("combination", call) == test:
            break
    else:
        raise AssertionError(f"no {'test' if test else 'train'} combination for {template!r}")
    said = rng.choice(PREFIXES) + colour_template(template, rng) + rng.choice(SUFFIXES)
    text = SLOT.sub(lambda m: drawn[m.group(1)][1], said)
    if rng.random() < 0.15:
        text = text[0].upper() + text[1:] + rng.choice([".", "!", "", "?"])
    return Request(text, call, function, template, call)


NAMES = (*FUNCTIONS, OUT_OF_SCOPE)
