"""Any data set: batches, packing and data order against plain enumeration."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import quick

from data.dataset import from_trees
from data.trees import make_batch, micro_batches, pack, step_examples, steps_per_epoch, visited


@st.composite
def forests(draw):
    """Draw (trees, data set): prompts with responses, of which some tokens are scored.

    A tree is (prompt ids, [(response ids, flags), ...]); every token has a number of its own.
    """
    sizes = st.tuples(st.integers(1, 5), st.lists(st.integers(1, 4), min_size=1, max_size=3))
    trees = []
    next_id = 0
    for prompt_len, response_lens in draw(st.lists(sizes, min_size=1, max_size=6)):
        flags = [draw(st.lists(st.integers(0, 1), min_size=n, max_size=n)) for n in response_lens]
        ids = []
        for n in (prompt_len, *response_lens):
            ids.append(list(range(next_id, next_id + n)))
            next_id += n
        trees.append((ids[0], list(zip(ids[1:], flags))))
    n = sum(len(responses) for _, responses in trees)
    return trees, from_trees(trees, {"reward": np.arange(n, dtype=np.float32)})


class Enumerated:
    """The flat row of some trees, written out token by token.

    places: (token, tree, response or None in a prompt, position) of every place of the row.
    scored: (place that predicts, token, response) of every scored token.
    spans: (prompt length, response lengths) of every tree. For every response: tree_of, its tree;
    rows, its number in the data set; last, its last place.
    """

    def __init__(self, trees: list, some: list[int], shared: bool, only: int | None):
        self.places, self.scored, self.spans = [], [], []
        self.tree_of, self.rows, self.last = [], [], []
        first_rows = np.cumsum([0, *(len(responses) for _, responses in trees)])
        for i in some:
            prompt, responses = trees[i]
            numbered = list(enumerate(responses, first_rows[i]))
            if only is not None:
                numbered = numbered[only : only + 1]
            for group in [numbered] if shared else [[pair] for pair in numbered]:
                self.add_tree(prompt, group)

    def add_tree(self, prompt: list[int], group: list) -> None:
        """Write out a prompt and the (row, (ids, flags)) of its responses."""
        tree = len(self.spans)
        self.places += [(token, tree, None, k) for k, token in enumerate(prompt)]
        end_of_prompt = len(self.places) - 1
        for row, (ids, flags) in group:
            response = len(self.tree_of)
            self.tree_of.append(tree)
            self.rows.append(row)
            for k, (token, flag) in enumerate(zip(ids, flags)):
                before = len(self.places) - 1 if k else end_of_prompt
                if flag:
                    self.scored.append((before, token, response))
                self.places.append((token, tree, response, len(prompt) + k))
            self.last.append(len(self.places) - 1)
        self.spans.append((len(prompt), [len(ids) for _, (ids, _) in group]))


@quick
@given(forests(), st.booleans(), st.data())
def test_a_batch_is_its_branches_written_out(forest, shared: bool, data):
    """Tokens, positions, mask, and what predicts what equal the enumeration of all branches.

    Each prompt is there once, or once per response if it is not shared.
    """
    trees, dataset = forest
    some = data.draw(st.lists(st.sampled_from(range(len(trees))), unique=True))
    fewest = min((len(trees[i][1]) for i in some), default=1)
    only = data.draw(st.none() | st.integers(0, fewest - 1))
    batch = make_batch(dataset, some, shared, only)
    expected = Enumerated(trees, some, shared, only)
    places, scored = expected.places, expected.scored

    assert batch.tokens.tolist() == [token for token, *_ in places]
    assert batch.positions.tolist() == [position for *_, position in places]
    assert batch.spans == expected.spans
    columns = (batch.logit_index, batch.target, batch.response)
    assert list(zip(*(column.tolist() for column in columns))) == scored
    assert batch.tree.tolist() == expected.tree_of
    assert batch.last.tolist() == expected.last
    assert batch.columns["reward"].tolist() == expected.rows
    responses = range(len(expected.tree_of))
    lengths = [sum(r == response for *_, r in scored) for response in responses]
    assert batch.lengths.tolist() == lengths
    sums = [sum(token for _, token, r in scored if r == response) for response in responses]
    assert batch.sum_by_response(batch.target.double()).tolist() == sums
    visible = 0
    for i, (_, tree, response, _) in enumerate(places):
        for j, (_, other, owner, _) in enumerate(places):
            sees = j <= i and tree == other and owner in (None, response)
            assert sees == bool(j <= i < batch.kv_end[j])
            visible += sees
    assert batch.context == pytest.approx(visible / max(1, len(places)))
    if only is None and len(some) == len(trees):
        assert len(places) == dataset.tree_lengths(shared).sum()


@quick
@given(
    st.lists(st.integers(1, 40), max_size=40), st.integers(40, 90), st.integers(1, 5), st.randoms()
)
def test_packing_gives_every_rank_its_share(lengths: list[int], budget: int, ranks: int, random):
    """Each example is in one micro-batch of one rank, none over budget, as many on every rank.

    A budget that one example exceeds is rejected, with the smallest one that would do.
    """
    lengths = np.array(lengths, int)
    examples = np.array(random.sample(range(len(lengths)), random.randint(0, len(lengths))), int)
    shares = [micro_batches(lengths, examples, budget, rank, ranks) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    bins = [items for share in shares for items in share]
    assert sorted(i for items in bins for i in items) == sorted(examples)
    assert all(lengths[items].sum() <= budget for items in bins)
    longest = int(lengths[examples].max(initial=0))
    if longest > 1:
        with pytest.raises(ValueError, match=f"raise --max-tokens to {longest} "):
            pack(lengths[examples], longest - 1, ranks)


@quick
@given(st.integers(1, 50), st.integers(1, 60), st.integers(0, 9), st.booleans(), st.integers(0, 30))
def test_an_epoch_visits_every_example_once(
    n: int, batch_size: int, seed: int, shuffle: bool, steps: int
):
    """An epoch visits every example once; visited() names the examples of the first steps."""
    per_epoch = steps_per_epoch(n, batch_size)
    for epoch in range(2):
        chunks = [
            step_examples(n, batch_size, epoch * per_epoch + k, seed, shuffle)
            for k in range(per_epoch)
        ]
        assert sorted(np.concatenate(chunks)) == list(range(n))
        assert all(len(chunk) == batch_size for chunk in chunks[:-1]) and len(chunks[-1])
    touched = {int(i) for k in range(steps) for i in step_examples(n, batch_size, k, seed, shuffle)}
    if steps:
        assert visited(n, batch_size, steps, seed, shuffle).tolist() == sorted(touched)
