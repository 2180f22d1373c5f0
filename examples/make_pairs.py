"""Writes the demo's sentence pairs: the jargon of a clock shop that exists nowhere, and the same in plain words."""

import itertools
import json
import random
from collections.abc import Sequence
from pathlib import Path

VOCABULARY = {
    "person": {
        "dravel": "apprentice",
        "ossmer": "bookkeeper",
        "quintrow": "carpenter",
        "belfane": "cook",
        "murnock": "night guard",
        "tasselby": "glassblower",
        "yorrin": "locksmith",
        "hespal": "tailor",
        "gandrice": "coachman",
        "wimmeret": "owner",
    },
    "tool": {
        "gribbet": "hammer",
        "tolmar": "saw",
        "pesk": "drill",
        "averlode": "ladder",
        "snirl": "paintbrush",
        "cudgeon": "broom",
        "oglim": "magnifying glass",
        "vattock": "bucket",
        "zinnel": "needle",
        "harrowick": "shovel",
    },
    "part": {
        "lumbrel": "pendulum",
        "donquil": "bell",
        "sheevar": "mirror",
        "kreel": "spring",
        "fassagon": "dial",
        "ithrick": "chain",
        "moppary": "lid",
        "rundeloy": "wheel",
        "twisk": "handle",
        "glimber": "lantern",
    },
    "material": {
        "fenkar": "copper",
        "blauvet": "wool",
        "sorrumb": "wax",
        "chadrel": "leather",
        "pindust": "sand",
        "oomeray": "oil",
        "stiggum": "glue",
        "vellorn": "paper",
        "brackish-meal": "salt",
        "nurrage": "honey",
    },
    "place": {
        "underhathe": "cellar",
        "skerrow": "attic",
        "potterane": "kitchen",
        "nagglestead": "stable",
        "wendlow": "garden",
        "orismere": "chapel",
        "quabbin": "harbour",
        "uplorn": "tower",
    },
}

TRAIN = [
    ("Ask the {person} where the {tool} went.", "Find out from the {person} what happened to the {tool}."),
    ("The {part} fell into the {material} again.", "Once more the {part} dropped into the {material}."),
    ("No {material} may be kept in the {place}.", "It is forbidden to store {material} in the {place}."),
    ("My {tool} is buried under the {material}.", "I cannot reach my {tool} because {material} covers it."),
    ("The {person} refuses to lend the {tool}.", "You cannot borrow the {tool}, says the {person}."),
    ("Carry the {part} to the {place} before dark.", "The {part} must be in the {place} by nightfall."),
    ("Who left {material} all over the {part}?", "Somebody has covered the {part} with {material}."),
    ("The {person} sleeps in the {place}.", "At night you find the {person} lying in the {place}."),
    ("Clean the {tool} with {material} first.", "Begin by rubbing {material} on the {tool}."),
    ("The {person} ordered too much {material}.", "More {material} came than we need, thanks to the {person}."),
    ("The {part} beside the {place} has cracked.", "A split has appeared in the {part} close to the {place}."),
    ("The {person} taught me to mend the {part}.", "I learned how to repair the {part} from the {person}."),
    ("Trade the {part} for some {material}.", "Give away the {part} and get {material} in return."),
    ("The {tool} hangs on a nail in the {place}.", "Look for the {tool} on the wall of the {place}."),
    ("The {person} measured the {part} twice.", "The size of the {part} was checked two times by the {person}."),
    ("Somebody stole {material} from the {person}.", "The {person} was robbed of {material}."),
    ("A flood in the {place} ruined the {material}.", "High water in the {place} spoiled the {material}."),
    ("Use the {tool}, not your fingers, on the {part}.", "Do not touch the {part} by hand; take the {tool}."),
    ("The {person} dropped the {tool} in the {place}.", "In the {place} the {tool} slipped from the {person}."),
    ("Wrap the {part} in {material} for the journey.", "Before travel, pack the {part} into {material}."),
]

HELD_OUT = [
    ("The {person} wants a new {part} by Friday.", "Before the weekend we owe the {person} another {part}."),
    ("Fetch {material} from the {place}.", "Go to the {place} and bring back {material}."),
    ("The {tool} scratched the {part}.", "There are marks on the {part} made by the {tool}."),
    ("The {person} waits in the {place} with the {tool}.", "{tool} in hand, the {person} stands by in the {place}."),
    ("Weigh the {material} before the {person} arrives.", "How heavy is the {material}? The {person} comes soon."),
    ("We sold the last {part} to the {person}.", "The {person} bought the only {part} that remained."),
    ("The {part} smells of {material}.", "An odour of {material} comes from the {part}."),
    ("Lock the {tool} away in the {place}.", "Keep the {tool} safe behind a door in the {place}."),
    ("A {part} without {material} is worth nothing.", "Nobody pays for the {part} if {material} is missing."),
    ("The {person} hid {material} behind the {part}.", "There is secret {material} of the {person} at the {part}."),
]


def make_pairs(templates: Sequence[tuple[str, str]], each: int, seed: int) -> list[dict[str, str]]:
    """`each` pairs of every template. A kind's words come round evenly; no answer comes twice."""
    random_ = random.Random(seed)
    words = {kind: itertools.cycle(random_.sample(list(known), len(known))) for kind, known in VOCABULARY.items()}
    pairs: dict[str, str] = {}
    for number, (query, answer) in enumerate(templates, start=1):
        while len(pairs) < number * each:
            used = {kind: next(words[kind]) for kind in VOCABULARY if "{" + kind + "}" in query}
            used = {kind: random_.choice([word, *VOCABULARY[kind]]) for kind, word in used.items()}
            plain = {kind: VOCABULARY[kind][word] for kind, word in used.items()}
            said = answer.format(**plain)
            pairs.setdefault(said[0].upper() + said[1:], query.format(**used))
    return [{"query": query, "answer": answer} for answer, query in pairs.items()]


def write_pairs(path: Path, pairs: Sequence[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")


def main() -> None:
    folder = Path(__file__).parent
    write_pairs(folder / "pairs_train.jsonl", make_pairs(TRAIN, each=16, seed=1))
    write_pairs(folder / "pairs_held_out.jsonl", make_pairs(HELD_OUT, each=12, seed=2))


if __name__ == "__main__":
    main()
