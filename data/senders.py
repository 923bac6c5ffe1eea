"""Rows of other systems under our keys.

    renamed({"question": "Q", "answer": "A"})    {"prompt": "Q", "response": "A"}

OpenRLHF {input, chosen, rejected}, Orca {question, ...}, GSM8K {question, answer}, MetaMath {query,
response}, Dolly {instruction, context, response}, LLaMA-Factory's kto_tag, ShareGPT's pairs, whose
chosen and rejected are one message each, OpenAI's preferences {input: {messages, tools},
preferred_output, non_preferred_output}, UltraFeedback {instruction, completions}.
"""

from typing import Any

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


def renamed(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row under our keys. ValueError: rated completions that are none."""
    new = {ALIASES.get(key, key): value for key, value in row.items()}

    def lacks(*names: str) -> bool:
        return all(new.get(name) is None for name in names)

    if isinstance(new.get("input"), dict) and "preferred_output" in row:
        asked = new.pop("input")
        new["prompt"] = asked.get("messages")
        new |= {key: value for key, value in asked.items() if key in TOOLS}
    if isinstance(new.get("completions"), list):
        new |= _best_and_worst(new.pop("completions"))
    question = next((key for key in QUESTIONS if isinstance(new.get(key), str)), None)
    if question and lacks(*ASKS):
        new["prompt"] = new.pop(question)
        if lacks(*ANSWERS) and isinstance(new.get("answer"), str):
            new["response"] = new["answer"]
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
        if isinstance(score, (int, float)) and not isinstance(score, bool):
            rated.append((float(score), completion["response"]))
    if not rated:
        raise ValueError("`completions` has none with an `overall_score`")
    (high, best), (low, worst) = (pick(rated, key=lambda one: one[0]) for pick in (max, min))
    if high == low:
        return {"response": best}
    rewards = {"chosen_reward": high, "rejected_reward": low}
    return {"response": best, "chosen": best, "rejected": worst, **rewards}
