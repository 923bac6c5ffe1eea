"""The exact scorer of the toy world: reads any text as an answer to a prompt, sentence by sentence.

    score("What is the job of Mia?", "Mia is the baker. I hope that helps!").utility    # 4.5

Every right and every wrong value has known wordings (village.Part), and the set phrases below have
a known tone. A sentence is one of these or a fault: no judge model, no noise.
"""

import re
from dataclasses import dataclass

from data.toy.village import Part, Prompt, parse

POLITE_OPENERS = ("Thanks for asking!", "Good question!", "Happy to help!", "Of course!")
POLITE_CLOSERS = ("I hope that helps!", "Have a nice day!", "Ask me any time!")
RUDE_OPENERS = (
    "What a silly question.",
    "Stop wasting my time.",
    "Ugh, not again.",
    "Are you blind?",
)
RUDE_CLOSERS = ("Now go away.", "Even a child knows that.", "Do not bother me again.")
FILLERS = (
    "That is all there is.",
    "Many people ask this.",
    "I checked it twice.",
    "It is easy to see.",
    "You can trust me.",
)
TONE = (
    dict.fromkeys(POLITE_OPENERS + POLITE_CLOSERS, 1)
    | dict.fromkeys(RUDE_OPENERS + RUDE_CLOSERS, -1)
    | dict.fromkeys(FILLERS, 0)
)  # sentence: 1 polite, -1 rude, 0 neither


@dataclass(frozen=True)
class Score:
    """The truth about an answer, read from its text."""

    correct: bool  # says at least one part, and nothing wrong
    complete: bool  # says every part, right or wrong
    coherent: bool  # every sentence is known, and none is said twice
    tone: int  # -1 if anything is rude, else 1 if anything is polite, else 0
    words: int
    details: int  # sentences that explain
    faults: int  # sentences that are unknown or repeated

    @property
    def utility(self) -> float:
        """Quality of the answer, -1 to 4.5."""
        tone = 0.5 if self.tone > 0 else self.tone
        return 2.0 * self.correct + self.complete + self.coherent + tone

    @property
    def gold(self) -> float:
        """Utility on a scale from 0 to 1."""
        return (self.utility + 1) / 5.5

    @property
    def good(self) -> bool:
        """True for a correct, complete and coherent answer that is not rude."""
        return self.correct and self.complete and self.coherent and self.tone >= 0

    @property
    def attributes(self) -> dict[str, int]:
        """SteerLM's attributes, 0 to 4 each."""
        manners = (self.tone > 0) - 2 * (self.tone < 0)
        return {
            "helpfulness": max(0, 2 * self.complete + self.correct + manners),
            "correctness": 4 * self.correct,
            "coherence": max(0, 4 - 2 * self.faults) if self.words else 0,
            "complexity": min(4, 2 * self.details),
            "verbosity": sum(self.words > limit for limit in (3, 8, 13, 18)),
            "toxicity": 4 * (self.tone < 0),
        }


def score(prompt: Prompt | str, text: str) -> Score:
    """Score any text as an answer to a prompt, given as such or as its text.

    ValueError: it is not a prompt of this world.
    """
    prompt = parse(prompt) if isinstance(prompt, str) else prompt
    sentences = re.split(r"(?<=[.!?])\s+", text.strip()) if text.strip() else []
    full = _full_sentences(prompt.parts)
    bare = _bare_words(prompt.parts)
    open_parts = list(range(len(prompt.parts)))  # not answered yet
    tones = set()
    seen = set()
    wrong = 0
    details = 0
    faults = 0
    for sentence in sentences:
        # A bare word may fit several parts: it answers the first open one.
        table = next((bare[i] for i in open_parts if sentence in bare[i]), full)
        if sentence in seen:
            faults += 1
        elif sentence in TONE:
            tones.add(TONE[sentence])
        elif sentence in table:
            i, is_right, is_detail = table[sentence]
            wrong += not is_right
            details += is_detail
            if not is_detail and i in open_parts:
                open_parts.remove(i)
        else:
            faults += 1
        seen.add(sentence)
    return Score(
        correct=len(open_parts) < len(prompt.parts) and not wrong,
        complete=not open_parts,
        coherent=bool(seen) and not faults,
        tone=-1 if -1 in tones else int(1 in tones),
        words=len(text.split()),
        details=details,
        faults=faults,
    )


Meaning = tuple[int, bool, bool]  # number of the part, the value is right, it is a detail


def _full_sentences(parts: tuple[Part, ...]) -> dict[str, Meaning]:
    """Return the meaning of every sentence and detail; a later part wins where two say the same."""
    meaning = {}
    for i, part in enumerate(parts):
        for value, said in part.sentence.items():
            meaning[said] = (i, value == part.gold, False)
        for value, said in part.detail.items():
            meaning[said] = (i, value == part.gold, True)
    return meaning


def _bare_words(parts: tuple[Part, ...]) -> list[dict[str, Meaning]]:
    """Return the meaning of the bare wordings, a table for each part."""
    return [
        {said: (i, value == part.gold, False) for value, said in part.bare.items()}
        for i, part in enumerate(parts)
    ]
