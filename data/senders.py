"""Rows of other systems under our keys.

    renamed({"question": "Q", "answer": "A"})    {"prompt": "Q", "response": "A"}

OpenRLHF {input, chosen, rejected}, Orca {question, ...}, GSM8K {question, answer}, MetaMath {query,
response}, Dolly {instruction, context, response}, LLaMA-Factory's kto_tag, ShareGPT's pairs, whose
chosen and rejected are one message each, OpenAI's preferences {input: {messages, tools},
preferred_output, non_preferred_output}, UltraFeedback {instruction, completions}.
"""

from typing import Any

from data.formats import FLOAT32_MAX

ALIASES = {  # key of another system -> ours
    "conversation": "conversations",
    "kto_tag": "label",
    "preferred_output": "chosen",
    "non_preferred_output": "rejected",
}
TOOLS = ("tools", "functions")  # the second is OpenAI's older name
ASKS = ("prompt", "input", "instruction", "messages", "conversations")
QUESTIONS = ("question", "query", "problem")  # other names of a prompt
ANSWERS = ("response", "completion", "output", "chosen", "chosen_response")


def renamed(row: dict[str, Any], kind: str = "") -> dict[str, Any]:
    """Return a row under our keys, for rows of a kind of data/keys.py or of any.

    ValueError: rated completions that are none, or two names of one thing that differ.
    """
    new = {key: value for key, value in row.items() if key not in ALIASES}
    for name, key in ALIASES.items():
        if row.get(name) is None:
            continue
        if new.get(key) not in (None, row[name]):
            raise ValueError(f"`{name}` and `{key}` say different things: keep one")
        new[key] = row[name]

    def lacks(*names: str) -> bool:
        return all(new.get(name) is None for name in names)

    if isinstance(new.get("input"), dict) and "preferred_output" in row:
        asked = new.pop("input")
        new["prompt"] = asked.get("messages")
        for key in TOOLS:
            if asked.get(key) is None:
                continue
            if new.get(key) not in (None, [], asked[key]):
                raise ValueError(f"`input.{key}` and `{key}` say different things: keep one")
            new[key] = asked[key]
    if isinstance(new.get("completions"), list):
        rated = _best_and_worst(new.pop("completions"))
        if kind in ("sft", "attributes", "weights"):
            rated = {"response": rated["response"]}
        elif kind and "chosen" in rated:
            del rated["response"]
        if kind == "label":
            rated = {key: value for key, value in rated.items() if not key.endswith("_reward")}
        for key in rated:
            if new.get(key) not in (None, rated[key]):
                raise ValueError(f"`{key}` beside `completions`: which is meant is not said")
        new |= rated
    question = next((key for key in QUESTIONS if isinstance(new.get(key), str)), None)
    if question and lacks(*ASKS):
        new["prompt"] = new.pop(question)
        if lacks(*ANSWERS) and isinstance(new.get("answer"), str):
            new["response"] = new.pop("answer")
    if isinstance(new.get("context"), str) and not lacks("instruction") and lacks("input"):
        new["input"] = new.pop("context")
    if isinstance(new.get("input"), str) and not lacks("chosen") and lacks("prompt", "instruction"):
        new["prompt"] = new.pop("input")
    for key in ("chosen", "rejected"):
        if isinstance(new.get(key), dict):
            new[key] = [new[key]]
            if isinstance(new.get("conversations"), list) and lacks("prompt"):
                new["prompt"] = new.pop("conversations")
    return new


def _best_and_worst(completions: list) -> dict[str, Any]:
    """Return the best of some rated completions, and the worst beside it if the scores differ.

    Zephyr's data (arXiv 2310.16944) draws the rejected one at random; the worst is a function of
    the row alone.
    """
    rated = []
    for k, completion in enumerate(completions):
        if not isinstance(completion, dict) or not isinstance(completion.get("response"), str):
            raise ValueError(f"`completions[{k}]` must be {{response, overall_score}}")
        score = completion.get("overall_score")
        is_number = isinstance(score, (int, float)) and not isinstance(score, bool)
        if is_number and abs(score) < FLOAT32_MAX:
            rated.append((float(score), completion["response"]))
    if not rated:
        raise ValueError("`completions` has none with an `overall_score`")
    (high, best), (low, worst) = (pick(rated, key=lambda one: one[0]) for pick in (max, min))
    if high == low:
        return {"response": best}
    rewards = {"chosen_reward": high, "rejected_reward": low}
    return {"response": best, "chosen": best, "rejected": worst, **rewards}
