"""Every word of the tiny world: what can be drawn, and what a caption may say.

Nouns, colours and relations are those of GenEval's wording. Signs carry words of ten letters, so that a small model
can learn to write them.
"""

from mogb_diffusion.rewards.geneval import RELATIONS as RELATIONS

SHAPES = ("circle", "square", "triangle")
COLORS = ("red", "yellow", "green", "blue", "purple")
NUMBERS = {2: "two", 3: "three", 4: "four"}
CARRIERS = ("sign", "card", "poster", "label")  # what a word is written on; they look alike
LETTERS = "ACEILNOPST"
WORDS = (
    "ACE", "ALE", "ANT", "APE", "CAN", "CAP", "CAT", "COP", "COT", "EAT", "ICE", "INN", "ION", "LAP", "LIE", "LIP",
    "LOT", "NAP", "NET", "NIL", "NOT", "OAT", "OIL", "ONE", "PAL", "PAN", "PEA", "PEN", "PIE", "PIN", "PIT", "POT",
    "SEA", "SET", "SIP", "SIT", "SON", "SPA", "TAN", "TAP", "TEA", "TEN", "TIE", "TIN", "TIP", "TOE", "TON", "TOP",
)  # fmt: skip
HELD_OUT_WORDS = ("CAT", "EAT", "ICE", "LIP", "NET", "ONE", "PAL", "PIN", "SEA", "SIT", "TEN", "TOP")

TOKENS = (
    "a", "photo", "of", "and", "that", "says", '"',
    *NUMBERS.values(), *COLORS, *SHAPES, *(f"{shape}s" for shape in SHAPES), *CARRIERS,
    *dict.fromkeys(word for relation in RELATIONS for word in relation.split() if word != "of"), *LETTERS,
)  # fmt: skip
