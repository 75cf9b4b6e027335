"""What is said: the sentences of the embedded corpus, and the split each of them belongs to.

A grammar of about 240 words: digit strings, small household sentences, and, in training, words and
fragments that stand alone. Words that sound alike are kept apart by where they can stand: TWO and
FOUR are always numbers, because there is no TO and no FOR. A hash of its words gives every sentence
to one split, so that however much speech is made, no sentence of a test is ever among it.
"""

import functools
import hashlib
import re

import numpy as np

WORD_SPLITS = ("test_single_words", "test_other_words", "train_words")  # the last is trained on
SPLITS = ("train", "validation", "test_seen_voices", "test_unseen_voices", *WORD_SPLITS)
DIGITS = "ZERO ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE".split()
TAGS = {",": "<COMMA>", ".": "<PERIOD>", "?": "<QUESTIONMARK>", "!": "<EXCLAMATIONPOINT>"}
GARBAGE = ("<SIL>", "<MUSIC>", "<NOISE>", "<OTHER>")
UNKNOWN = "<UNK>"  # transcript of speech outside the vocabulary: the model is to write nothing

# Alternatives of a slot, separated by "|". A slot may use other slots.
GRAMMAR = {
    "digit": "|".join(DIGITS),
    "teen": "TEN|ELEVEN|TWELVE|THIRTEEN|FOURTEEN|FIFTEEN|SIXTEEN|SEVENTEEN|EIGHTEEN|NINETEEN",
    "tens": "TWENTY|THIRTY|FORTY|FIFTY|SIXTY|SEVENTY|EIGHTY|NINETY",
    "number": "{teen}|{tens}|{tens} {digit}|{digit} HUNDRED|{digit}",
    "small": "{teen}|{tens}|{digit}",
    "code": "{digit} {digit} {digit}|{digit} {digit} {digit} {digit}",
    "day": "MONDAY|TUESDAY|WEDNESDAY|THURSDAY|FRIDAY|SATURDAY|SUNDAY",
    "month": "JANUARY|FEBRUARY|MARCH|APRIL|MAY|JUNE|"
    "JULY|AUGUST|SEPTEMBER|OCTOBER|NOVEMBER|DECEMBER",
    "when": "TODAY|TOMORROW|TONIGHT|{day}",
    "part": "MORNING|EVENING|AFTERNOON",
    "name": "ANNA|BEN|CLARA|DAVID|EMMA|FRANK|GRACE|HENRY|JULIA|KEVIN|LAURA|MARTIN|NANCY|PETER",
    "city": "LONDON|PARIS|BERLIN|ROME|MADRID|LISBON|VIENNA|DUBLIN|BOSTON|CHICAGO|TORONTO|SYDNEY",
    "room": "KITCHEN|BEDROOM|BATHROOM|GARAGE|GARDEN|OFFICE|HALL|ATTIC",
    "device": "LIGHT|LAMP|FAN|HEATER|RADIO|TELEVISION|CAMERA|ALARM|COMPUTER|PRINTER",
    "opening": "DOOR|WINDOW|GATE|CURTAIN|DRAWER|FRIDGE|OVEN|BOX",
    "thing": "BOOK|CUP|PLATE|BOTTLE|CLOCK|PHONE|BAG|COAT|HAT|SHIRT|UMBRELLA|CANDLE|PILLOW|KEY",
    "seat": "TABLE|CHAIR|SOFA|SHELF",
    "food": "BREAD|BUTTER|CHEESE|COFFEE|WATER|MILK|SUGAR|RICE|SOUP|TOMATO|APPLE",
    "colour": "RED|GREEN|YELLOW|BLACK|WHITE|ORANGE|PURPLE|BROWN|PINK|GREY|BLUE",
    "weather": "SUNNY|RAINY|WINDY|CLOUDY|COLD|WARM",
    "switch": "ON|OFF",
    "where": "UNDER|BEHIND|NEAR|ON",
    "way": "LEFT|RIGHT|UP|DOWN",
    "ride": "TRAIN|BUS|PLANE",
    "place": "ROOM|PLATFORM|CHANNEL|PAGE|NUMBER",
    "start": "START|STOP|PAUSE|REPEAT",
    "media": "MUSIC|NEWS|SONG|TIMER",
    "who": "MY|YOUR",
}

SENTENCES = """
TURN {switch} THE {room} {device}.
PLEASE SWITCH THE {colour} {device} {switch}.
SWITCH {switch} THE {device} IN THE {room}.
{name}, OPEN THE {opening}.
OPEN THE {room} {opening}, PLEASE.
SHUT THE {opening} NOW!
LOCK THE {room} {opening}, {name}.
{start} THE {media}.
{start} THE {media} IN THE {room}, PLEASE.
BRING ME THE {colour} {thing}.
PUT THE {thing} {where} THE {seat}.
TAKE {who} {thing} AND THE {colour} {thing}.
MOVE THE {seat} {way}.
MOVE THE {thing} {way} AND WAIT.
FIND {who} {thing} NOW!
WHERE IS THE {colour} {thing}?
WHO HAS {who} {thing}?
IS THE {thing} {where} THE {colour} {seat}?
CAN YOU SEE THE {colour} {thing}?
CAN YOU HEAR THE {device}?
DO YOU LIKE {food} AND {food}?
DO YOU LIKE THE {colour} {seat}?
YES, {food} AND {food}, PLEASE.
NO, I WANT {food} AND {food}.
WE NEED {food}, {food} AND {food}.
HOW MUCH {food} DO YOU WANT?
HOW MUCH IS THE {colour} {thing}?
THE {thing} IS {number} EURO.
THE {thing} IS {colour} AND THE {thing} IS {colour}.
{colour}, {colour} AND {colour}.
WHAT TIME IS IT IN {city}?
HOW FAR IS {city} FROM {city}?
{name} IS IN {city} WITH {name}.
{name} AND {name} WANT THE {colour} {thing}.
IS {name} IN {city} OR {city}?
WHEN DOES THE {ride} LEAVE {city}?
THE {ride} FROM {city} IS LATE.
THE {ride} LEAVES {city} AT {small}.
IT IS {weather} IN {city} {when}.
WILL IT BE {weather} IN {city} {when}?
YESTERDAY IT WAS {weather} AND {weather}.
TODAY IS {day}, {month} {small}.
IS IT {day} OR {day}?
{month} IS {weather} AND {month} IS {weather}.
{name} WAS HERE IN {month}.
{name} WAS IN {city} ON {day} {part}.
SEE YOU {day} {part}, {name}.
GOODBYE, {name}, SEE YOU {when}!
HELLO {name}, THIS IS {name}.
THANK YOU, {name}!
CALL {name} ON {day} {part}.
CALL {name} AT {code}.
WAKE ME AT {small} {when}.
SET THE {media} AT {number}.
SET THE {device} AT {tens} {digit}.
{who} CODE IS {code}.
IS {who} CODE {code}?
GO {way} AND {way} AT {place} {small}.
{place} {tens} {digit}, PLEASE.
{place} {number} OR {place} {number}?
{number} AND {number} IS {number}.
{teen}, {tens} AND {tens} {digit}.
PLAY {place} {number} IN THE {room}.
PLAY THE {media} {when}.
HELP ME, {name}!
STOP!
WAIT, {name}!
YES.
NO!
""".split("\n")[1:-1]

# What people say without a sentence around it.
FRAGMENTS = """
{month} {small}.
{day} {part}.
{day}, {month} {small}.
{tens} {digit}.
{digit} HUNDRED.
{number} EURO.
{place} {number}.
AT {small}.
{start} THE {media}.
TURN {switch}.
TURN IT {switch}.
OPEN THE {opening}.
GO {way}.
MOVE {way}.
THE {room} {device}.
THE {colour} {thing}.
{colour} {thing}.
{room} {device}.
{city}, {when}.
SEE YOU {when}.
HELLO {name}.
GOODBYE {name}.
YES, PLEASE.
NO, THANK YOU.
THANK YOU.
HELP ME!
{food}, PLEASE.
""".split("\n")[1:-1]
COUNTED = re.findall(r"[A-Z]+", "{digit} {teen} {tens} HUNDRED".format(**GRAMMAR))
DATES = re.findall(r"[A-Z]+", "{day} {month}".format(**GRAMMAR))
SLOTS = re.compile(r"\{\w+\}")
VOCABULARY = sorted(
    {w for s in [*SENTENCES, *GRAMMAR.values()] for w in re.findall("[A-Z]+", SLOTS.sub("", s))}
)


HOMOPHONES = set(
    "TO TOO FOR FORE ATE WON READ KNOW NEW BLEW BRED WHITES WRITE SOME SUNDAE ITS HEAR WEAR "
    "WHERES WEIGHT MALE OFF OF ORE NIGH BY BYE HI SEA SEES HALLS CLOCKS BOOKS".split()
)  # or nearly so: alone, they sound like words of the vocabulary


def fill(template: str, rng: np.random.Generator) -> str:
    """Replaces every {slot} by one of its alternatives; no alternative is used twice in a row."""
    used: dict[str, str] = {}

    def choose(match: re.Match) -> str:
        slot = match.group(1)
        options = [o for o in GRAMMAR[slot].split("|") if o != used.get(slot) or "{" in o]
        used[slot] = options[rng.integers(len(options))]
        return used[slot]

    while "{" in template:
        template = re.sub(r"\{(\w+)\}", choose, template)
    return template


def digit_string(rng: np.random.Generator) -> str:
    """One to seven digits, mostly three to five."""
    length = rng.choice(np.arange(1, 8), p=[0.05, 0.08, 0.25, 0.27, 0.22, 0.08, 0.05])
    return " ".join(rng.choice(DIGITS, length)) + "."


def single_word(rng: np.random.Generator) -> str:
    """Any word of the vocabulary; numbers, and days and months, in every second clip."""
    kind = rng.choice(3, p=[0.5, 0.3, 0.2])
    return rng.choice((VOCABULARY, COUNTED, DATES)[kind]) + rng.choice(list("...?!"))


def short_phrase(rng: np.random.Generator) -> str:
    """What stands alone: a word in two clips of three, or else a fragment."""
    if rng.random() < 2 / 3:
        return single_word(rng)
    return fill(FRAGMENTS[rng.integers(len(FRAGMENTS))], rng)


OTHER_LENGTHS = [0.2, 0.1, 0.1, 0.15, 0.15, 0.1, 0.1, 0.1]  # shares of one to eight words


@functools.cache
def other_words(split: str) -> list[str]:
    """English words outside the vocabulary, of GPT-2's tokens: four of five are for training."""
    from utils.tokenizer import load_mergeable_ranks  # imported late: it loads torch

    known = {*VOCABULARY, *HOMOPHONES}
    tokens = (token.decode("latin-1") for token in load_mergeable_ranks("gpt2"))
    words = [token[1:].upper() for token in tokens if re.fullmatch(" [a-z]{3,12}", token)]
    words = [word for word in words if not {word, word.removesuffix("S")} & known]
    held_out = [hashlib.sha256(word.encode()).digest()[0] % 5 == 0 for word in words]
    return [w for w, h in zip(words, held_out, strict=True) if h != (split == "train")]


def other_speech(rng: np.random.Generator, split: str = "train") -> str:
    """One to eight words outside the vocabulary; in every second one, the more common ones."""
    words, length = other_words(split), rng.choice([1, 2, 3, 4, 5, 6, 7, 8], p=OTHER_LENGTHS)
    commonest = len(words) // 10 if rng.random() < 0.5 else len(words)
    spoken = list(rng.choice(words[:commonest], length))
    if length > 3 and rng.random() < 0.5:  # as any English sentence does, it holds some of ours
        spoken[rng.integers(length)] = rng.choice(["THE", "IS", "AND", "IN", "YOU", "ON", "MY"])
    return " ".join(spoken) + "."


def words_of(sentence: str) -> list[str]:
    """The words alone, without punctuation."""
    return re.findall(r"[A-Z]+", sentence)


def split_of(sentence: str) -> str:
    """The only split that may hold the sentence, by a hash of its words: the same for ever.

    One and two words are vocabulary rather than sentences; they always belong to training, and it
    is by its voices alone that test_single_words is held out.
    """
    words = words_of(sentence)
    if len(words) < 3:
        return "train"
    bucket = int.from_bytes(hashlib.sha256(" ".join(words).encode()).digest()[:4]) % 100
    return "train" if bucket < 76 else SPLITS[1 + (bucket - 76) // 8]


def transcript(sentence: str) -> str:
    """GigaSpeech's spelling: `WAIT, ANNA!` becomes `WAIT <COMMA> ANNA <EXCLAMATIONPOINT>`."""
    return " ".join(TAGS.get(token, token) for token in re.findall(r"[A-Z]+|[,.?!]", sentence))
