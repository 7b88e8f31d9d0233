"""Slot values of the assistant: each slot draws a value and the words by which a person says it.

A slot is a function ``(random.Random) -> (value, surface)``: ``value`` is what stands in the JSON call,
``surface`` what stands in the utterance. Knows nothing of functions or phrasings.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

Value = str | int | float
Slot = Callable[[Random], tuple[Value, str]]

ROOMS = "kitchen bedroom bathroom hallway garage office attic basement nursery balcony pantry laundry".split()
ROOMS += ["living room", "dining room", "guest room", "front porch"]
COLORS = "red green blue white yellow purple orange pink teal amber".split()
GENRES = "jazz rock pop folk blues disco reggae techno classical country funk soul metal ambient".split()
ARTISTS = ["the blue herons", "nora quill", "velvet tram", "old harbour band", "mira sol", "the paper kites club"]
ARTISTS += ["juno park", "echo valley", "sam holloway", "the late trains", "ada bright", "northern pines"]
CONTACTS = "mom dad alice bob carol david emma felix grace henry iris jack kate liam maya noah olivia peter".split()
CONTACTS += "quinn rosa sam tara umar vera will xena yusuf zoe grandma".split()
CONTACTS += ["uncle joe", "aunt may", "doctor lee", "my brother", "my sister", "the plumber"]
ITEMS = "milk eggs bread butter cheese apples rice pasta coffee tea sugar flour salt onions carrots honey".split()
ITEMS += "soap candles batteries napkins yogurt bananas tomatoes lemons spinach oats".split()
ITEMS += ["olive oil", "dog food", "light bulbs", "orange juice", "toilet paper", "green beans", "peanut butter"]
LISTS = ["shopping", "grocery", "todo", "packing", "party", "hardware"]
CITIES = "paris london berlin tokyo madrid rome oslo cairo lima boston denver austin seattle dublin prague".split()
CITIES += "vienna athens zurich mumbai sydney toronto chicago".split() + ["new york", "san diego", "cape town"]
DAYS = "monday tuesday wednesday thursday friday saturday sunday today tomorrow".split()
PLACES = ["the airport", "the station", "the library", "the museum", "the gym", "the dentist", "the park", "work"]
PLACES += ["the mall", "the harbour", "the stadium", "the bakery", "city hall", "the pharmacy", "the hospital", "home"]
MODES = {"car": ["by car", "driving"], "bike": ["by bike", "cycling"], "walk": ["on foot", "walking"]}
MODES |= {"bus": ["by bus", "taking the bus"], "train": ["by train", "taking the train"]}
EVENTS = ["dentist appointment", "team meeting", "yoga class", "piano lesson", "lunch with anna", "book club"]
EVENTS += ["project review", "haircut", "parent evening", "birthday party", "job interview", "car service"]
DOORS = ["front door", "back door", "garage door", "side gate", "cellar door", "main gate"]
LABELS = "pasta eggs laundry tea pizza workout nap cake bread homework break meditation".split()
UNITS = {"miles": "length", "kilometers": "length", "feet": "length", "meters": "length", "inches": "length"}
UNITS |= {"pounds": "mass", "kilograms": "mass", "ounces": "mass", "cups": "volume", "liters": "volume"}
ONES = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
ONES += "seventeen eighteen nineteen".split()
TENS = ["", "", *"twenty thirty forty fifty sixty seventy eighty ninety".split()]
MINUTE_WORDS = {0: "", 5: "oh five", 10: "ten", 15: "fifteen", 20: "twenty", 25: "twenty five", 30: "thirty"}
MINUTE_WORDS |= {35: "thirty five", 40: "forty", 45: "forty five", 50: "fifty", 55: "fifty five"}


def convertible(from_unit: str, to_unit: str) -> bool:
    """Whether two different units measure the same thing."""
    return from_unit != to_unit and UNITS[from_unit] == UNITS[to_unit]


def words(number: int) -> str:
    """Spell 0..199 as spoken, such as ``forty two``."""
    if number < 20:
        return ONES[number]
    if number < 100:
        return TENS[number // 10] + (f" {ONES[number % 10]}" if number % 10 else "")
    rest = number - 100
    return "one hundred" + (f" and {words(rest)}" if rest else "")


def choice(values: list[str]) -> Slot:
    """A slot whose words are its value."""

    def draw(rng: Random) -> tuple[Value, str]:
        value = rng.choice(values)
        return value, value

    return draw


def spoken(table: dict[str, list[str]]) -> Slot:
    """A slot whose value is said in one of several ways."""

    def draw(rng: Random) -> tuple[Value, str]:
        value = rng.choice(sorted(table))
        return value, rng.choice(table[value])

    return draw


def number(low: int, high: int, step: int = 1) -> Slot:
    """A whole number in ``low..high``; a quarter of the time in words."""

    def draw(rng: Random) -> tuple[Value, str]:
        value = rng.randrange(low, high + 1, step)
        return value, words(value) if rng.random() < 0.25 else str(value)

    return draw


def amount(rng: Random) -> tuple[Value, str]:
    """An amount with at most one decimal, such as 2.5."""
    if rng.random() < 0.35:
        value = rng.randrange(1, 400) / 10
        if value != int(value):
            return value, str(value)
    whole = rng.randrange(1, 200)
    return whole, words(whole) if rng.random() < 0.2 else str(whole)


def clock(rng: Random) -> tuple[Value, str]:
    """A time of day as ``HH:MM`` (24 hours), said with am/pm or a part of the day."""
    hour, minute = rng.randrange(24), rng.choice([0, 0, 0, 15, 30, 30, 45, 5, 10, 20, 25, 35, 40, 50, 55])
    value = f"{hour:02d}:{minute:02d}"
    twelve = hour % 12 or 12
    half = "am" if hour < 12 else "pm"
    if minute == 0 and hour in (0, 12) and rng.random() < 0.5:
        return value, "midnight" if hour == 0 else "noon"
    style = rng.random()
    if style < 0.25:
        return value, value
    if style < 0.55:
        return value, f"{twelve} {half}" if minute == 0 else f"{twelve}:{minute:02d} {half}"
    part = "in the morning" if hour < 12 else "in the afternoon" if hour < 18 else "in the evening"
    if style < 0.7 and minute in (15, 30):
        return value, f"{'quarter' if minute == 15 else 'half'} past {words(twelve)} {part}"
    if style < 0.85:
        return value, f"{words(twelve)} {MINUTE_WORDS[minute]} {half}".replace("  ", " ")
    return value, f"{twelve} {part}" if minute == 0 else f"{twelve}:{minute:02d} {part}"


def message(rng: Random) -> tuple[Value, str]:
    """A short free text, copied into the call word for word."""
    kind = rng.randrange(10)
    who, what, day = rng.choice(CONTACTS), rng.choice(ITEMS), rng.choice(DAYS)
    texts = [
        f"i am running {rng.randrange(2, 60)} minutes late",
        f"please bring {what} and {rng.choice(ITEMS)}",
        f"see you on {day}",
        f"dinner is at {rng.randrange(5, 10)}",
        f"call {who} when you are {rng.choice(['free', 'home', 'done', 'awake'])}",
        f"we need more {what}",
        f"the {rng.choice(DOORS)} is {rng.choice(['open', 'stuck', 'locked', 'broken'])}",
        f"meet me at {rng.choice(PLACES)}",
        rng.choice(["happy birthday", "on my way", "good luck today", "i miss you", "thanks for the help", "all good"]),
        f"{who} is {rng.choice(['sick', 'here', 'asleep', 'waiting', 'late'])} {rng.choice(['again', 'now', 'today'])}",
    ]
    return texts[kind], texts[kind]


SLOTS: dict[str, Slot] = {
    "room": choice(ROOMS),
    "level": number(0, 100),
    "state": spoken({"on": ["on"], "off": ["off"]}),
    "color": choice(COLORS),
    "degrees": number(10, 30),
    "minutes": number(1, 120),
    "label": choice(LABELS),
    "time": clock,
    "day": choice(DAYS),
    "genre": choice(GENRES),
    "artist": choice(ARTISTS),
    "contact": choice(CONTACTS),
    "text": message,
    "item": choice(ITEMS),
    "list": choice(LISTS),
    "city": choice(CITIES),
    "destination": choice(PLACES),
    "mode": spoken(MODES),
    "title": choice(EVENTS),
    "value": amount,
    "from": choice(sorted(UNITS)),
    "to": choice(sorted(UNITS)),
    "door": choice(DOORS),
    "action": spoken({"lock": ["lock"], "unlock": ["unlock"]}),
    "direction": spoken({"next": ["next"], "previous": ["previous"]}),
}
