"""What tasks in words are made of: people, things, containers, places, and which of the places a text names."""

from __future__ import annotations

import re

from diffmas.answers import reasoning
from diffmas.tasks.base import Item

PEOPLE = (
    "Ada", "Ahmed", "Alice", "Ana", "Ben", "Boris", "Carla", "Chen", "Clara", "Daniel", "David", "Elena", "Emil",
    "Emma", "Erik", "Fatima", "Felix", "Grace", "Hana", "Henry", "Igor", "Ines", "Ivan", "Jack", "Julia", "Kai",
    "Karim", "Laura", "Lena", "Leo", "Lucas", "Lucy", "Maria", "Marco", "Maya", "Mia", "Nadia", "Nina", "Noah",
    "Nora", "Oliver", "Omar", "Oscar", "Paul", "Petra", "Priya", "Rosa", "Ruth", "Sam", "Sara", "Simon", "Sofia",
    "Tariq", "Theo", "Tom", "Vera", "Victor", "Yuki", "Zoe",
)  # fmt: skip
THINGS = (
    "umbrella", "wallet", "passport", "camera", "notebook", "hat", "scarf", "guitar", "violin", "letter", "map",
    "watch", "ring", "necklace", "book", "lamp", "knife", "bicycle", "helmet", "suitcase", "backpack", "phone",
    "charger", "laptop", "jacket", "coat", "glove", "candle", "mirror", "painting", "vase", "kettle", "teapot",
    "hammer", "ladder", "rope", "whistle", "trumpet", "drum", "newspaper", "ticket", "coin", "photo", "blanket",
    "pillow", "shovel", "broom", "bucket",
)  # fmt: skip
#: With the preposition that goes with each.
PLACES = {
    "kitchen": "in", "garden": "in", "garage": "in", "attic": "in", "cellar": "in", "bathroom": "in", "library": "in",
    "office": "in", "hallway": "in", "bedroom": "in", "barn": "in", "shed": "in", "theater": "in", "museum": "in",
    "church": "in", "hospital": "in", "bakery": "in", "pharmacy": "in", "cafe": "in", "hotel": "in", "airport": "at",
    "station": "at", "harbor": "at", "market": "at", "school": "at", "beach": "on", "balcony": "on", "terrace": "on",
    "roof": "on", "bus": "on", "train": "on", "ferry": "on", "bridge": "on", "stairs": "on", "lawn": "on",
    "tent": "in", "taxi": "in", "chapel": "in", "gym": "in", "stadium": "in",
}  # fmt: skip
COLORS = ("red", "blue", "green", "yellow", "black", "white", "brown", "gray", "purple", "orange")
CONTAINERS = ("box", "bag", "basket", "chest", "jar", "drawer", "crate", "trunk")

_PLACE = re.compile(rf"\b({'|'.join(PLACES)})\b", re.IGNORECASE)


def at(place: str) -> str:
    """The place as it stands in a sentence: "on the beach"."""
    return f"{PLACES[place]} the {place}"


def sentence(text: str) -> str:
    """With a capital letter."""
    return text[0].upper() + text[1:]


def place(text: str) -> str | None:
    """The one place that a text names; None where it names none, or more than one."""
    found = {name.lower() for name in _PLACE.findall(reasoning.removed(text))}
    return found.pop() if len(found) == 1 else None


def names_place(text: str, item: Item) -> bool:
    """Whether the item's place, and no other, is named."""
    return place(text) == item["gold"]
