"""Hypothesis strategies of several property tests: any JSON, rows of data, lines of a file."""

import json

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

quick = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))

TRANSCRIPT = "\n\nHuman: a\n\nAssistant: b"
HALF_PAIR = "\ud800"  # half of a surrogate pair: JSON can say it, UTF-8 cannot
texts = st.text(max_size=6) | st.sampled_from([TRANSCRIPT, "\n\nAssistant:", HALF_PAIR, ""])
numbers = st.integers() | st.floats() | st.sampled_from([10**400, 1e39, 2, 1.0])
scalars = st.none() | st.booleans() | numbers | texts
roles = st.sampled_from(["user", "assistant", "system", "human", "gpt", "Human", "robot", 3])
message = st.fixed_dictionaries({"role": roles, "content": texts})
message |= st.fixed_dictionaries({"from": roles, "value": texts})
messages = st.lists(message, max_size=4)
json_values = st.recursive(
    scalars | messages,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)

KEYS = """prompt response completion input output instruction messages conversations system chosen
rejected chosen_response rejected_response margin chosen_reward score_rejected label preference
responses attributes weights helpfulness""".split()
names = st.sampled_from(["helpfulness", "verbosity", "charm"])
attributes = st.dictionaries(names, scalars | st.just(4), max_size=2)
fitting = {  # key -> values that may fit it; text or messages for the others
    "responses": st.lists(texts | messages, max_size=3),
    "attributes": attributes | st.lists(attributes, max_size=3),
    "weights": st.lists(st.floats() | scalars, max_size=3),
    "label": st.booleans(),
    "helpfulness": st.integers(0, 4),
}


@st.composite
def rows(draw):
    """Return a row with known keys; its values fit them or are any JSON."""
    keys = draw(st.lists(st.sampled_from(KEYS), max_size=6, unique=True))
    return {key: draw(json_values | fitting.get(key, texts | messages)) for key in keys}


noise = st.binary(max_size=30).map(lambda b: b.replace(b"\n", b""))
odd = [b"", b" ", b"[]", b"\xff", b"[" * 5000, b"9" * 5000, b'{"prompt": ' + b"9" * 5000 + b"}"]
lines = rows().map(json.dumps).map(str.encode) | noise | st.sampled_from(odd)
