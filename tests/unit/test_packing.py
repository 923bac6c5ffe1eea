"""Packing and the order of examples: the same as slow twins, at a cost that grows as rows do."""

import time
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

import data.dataset
import data.mismatched
import runtime
from data.dataset import Dataset, from_trees
from data.mismatched import kto_trees, partners
from data.trees import pack, step_examples, steps_per_epoch, visited


def pack_slowly(lengths: np.ndarray, budget: int, ranks: int) -> list[list[int]]:
    """First-fit-decreasing by its definition: look at every bin for every item."""
    bins: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        for items in bins:
            if sum(lengths[j] for j in items) + lengths[i] <= budget:
                items.append(i)
                break
        else:
            bins.append([i])
    while len(bins) % ranks:
        most = max(range(len(bins)), key=lambda b: len(bins[b]))
        bins[most], split = bins[most][::2], bins[most][1::2]
        bins.append(split)
    bins.sort(key=lambda items: -sum(lengths[i] for i in items))
    return [sorted(items) for items in bins]


@pytest.mark.slow
def test_packing_is_first_fit_decreasing_bin_for_bin():
    """On thousands of random cases: few and many bins, equal sizes, sizes 0 and budget, ranks."""
    rng = np.random.default_rng(0)
    for case in range(4000):
        budget = int(rng.integers(1, 100))
        least = int(rng.integers(0, budget + 1)) if case % 2 else 0
        lengths = rng.integers(least, budget + 1, rng.integers(0, 50))
        ranks = int(rng.integers(1, 9))
        expected = pack_slowly(lengths, budget, ranks)
        assert pack(lengths, budget, ranks) == expected, (lengths, budget, ranks)


@pytest.mark.parametrize(("budget", "ranks"), [(300, 1), (300, 64), (1000, 7)])
def test_packing_many_items_is_first_fit_decreasing_bin_for_bin(budget: int, ranks: int):
    """With hundreds of bins, so that the tree of rooms is deep."""
    lengths = np.random.default_rng(1).lognormal(4, 0.7, 700).astype(np.int64).clip(1, 300)
    assert pack(lengths, budget, ranks) == pack_slowly(lengths, budget, ranks)


def fastest(call, *arguments) -> float:
    """Return the CPU-seconds of the fastest of three calls."""
    seconds = []
    for _ in range(3):
        began = time.process_time()
        call(*arguments)
        seconds.append(time.process_time() - began)
    return min(seconds)


def test_packing_eight_times_the_rows_takes_about_eight_times_as_long():
    """Looking at every bin for every item would take 64 times as long."""
    lengths = np.random.default_rng(0).integers(20, 200, 40000)
    assert fastest(pack, lengths, 1024) < 20 * fastest(pack, lengths[:5000], 1024)


def test_partners_of_one_long_run_cost_as_many_steps_as_examples():
    """A batch with a single other prompt, last: looking ahead would take n * n / 2 steps."""
    n = 20000
    began = time.process_time()
    assert partners([0] * (n - 1) + [1]) == [n - 1] * (n - 1) + [0]
    assert time.process_time() - began < 2


def test_partners_are_the_next_examples_with_another_prompt():
    """Cyclically, as their definition says; an error where there is only one prompt."""
    rng = np.random.default_rng(0)
    for _ in range(2000):
        prompts = rng.integers(0, rng.integers(1, 5), rng.integers(1, 12)).tolist()
        n = len(prompts)
        if len(set(prompts)) == 1:
            with pytest.raises(ValueError, match=f"{n} example.* of a single prompt"):
                partners(prompts)
            continue
        ahead = [[(i + k) % n for k in range(1, n)] for i in range(n)]
        assert partners(prompts) == [
            next(j for j in ahead[i] if prompts[j] != prompts[i]) for i in range(n)
        ]


def rows_of(prompt_sizes: list[int], response_sizes: list[list[int]]) -> Dataset:
    """Return a data set of ones with these lengths."""
    return from_trees(
        (np.ones(prompt), [(np.ones(n), np.ones(n)) for n in sizes])
        for prompt, sizes in zip(prompt_sizes, response_sizes)
    )


def kto_trees_slowly(data: Dataset, steps: list[np.ndarray], longest: int, mismatched: bool):
    """KTO's trees, built one by one from lists."""
    tokens, scored, responses = data.tokens.tolist(), data.scored.tolist(), []
    for i, first in enumerate(data.tree_start[:-1]):
        prompt, first = tokens[first : first + data.prompt_len[i]], first + data.prompt_len[i]
        for size in data.response_len[data.response_start[i] : data.response_start[i + 1]]:
            part = slice(first, first + size)
            responses.append((prompt, tokens[part], scored[part]))
            first += size
    trees, label = [], []
    for step in steps:
        others = partners([str(responses[i][0]) for i in step]) if mismatched else []
        for i, number in enumerate(step):
            prompt, ids, flags = responses[number]
            answers = [(ids[:longest], flags[:longest])]
            if mismatched:
                room = max(1, longest - len(prompt))
                _, ids, flags = responses[step[others[i]]]
                answers.append((ids[:room], flags[:room]))
            trees.append((prompt, answers))
            label += [data.columns["label"][number]] * len(answers)
    return from_trees(trees, {"label": np.array(label, np.float32)})


def test_kto_trees_are_those_built_one_by_one(monkeypatch):
    """Every array and its type, with and without another prompt's response, cut and whole."""
    monkeypatch.setattr(data.mismatched, "GATHER_ROWS", 3)
    rng = np.random.default_rng(0)
    compared = 0
    for case in range(400):
        rows = []
        for _ in range(rng.integers(1, 12)):
            sizes = rng.integers(0, 9, rng.integers(1, 4))
            answers = [(rng.integers(0, 99, n), rng.integers(0, 2, n)) for n in sizes]
            rows.append((rng.integers(0, 2, rng.integers(1, 4)), answers))
        n = sum(len(answers) for _, answers in rows)
        label = rng.integers(0, 2, n).astype(np.float32)
        labelled = from_trees(rows, {"label": label})
        steps = np.array_split(rng.permutation(n), max(1, n // 4))
        longest, mismatched = int(rng.integers(2, 9)), bool(case % 3)
        try:
            expected = kto_trees_slowly(labelled, steps, longest, mismatched)
        except ValueError:
            with pytest.raises(ValueError, match="of a single prompt.*choose another --batch-size"):
                kto_trees(labelled, steps, longest, mismatched)
            continue
        trees = kto_trees(labelled, steps, longest, mismatched)
        compared += 1
        for name, values in vars(expected).items():
            if isinstance(values, np.ndarray):
                assert np.array_equal(getattr(trees, name), values), name
                assert getattr(trees, name).dtype == values.dtype, name
        assert np.array_equal(trees.columns["label"], expected.columns["label"])
    assert compared > 200


def test_the_check_that_rows_fit_reports_what_packing_would():
    """The same text as `pack`, with prompts shared and repeated; nothing for rows that fit."""
    data = rows_of([5, 3], [[2, 4], [1]])
    for shared, longest in ((True, 11), (False, 16)):
        config = SimpleNamespace(share_prompts=shared, max_tokens=longest)
        runtime.check_fit(data, config)
        config.max_tokens = longest - 1
        with pytest.raises(ValueError, match=f"raise --max-tokens to {longest} ") as error:
            runtime.check_fit(data, config)
        with pytest.raises(ValueError, match=f"raise --max-tokens to {longest} ") as same:
            pack(data.tree_lengths(shared), longest - 1)
        assert str(error.value) == str(same.value)


def test_responses_of_trees_are_listed_in_the_order_given():
    """For trees with any number of responses, none too, named once or more often."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        counts = rng.integers(0, 4, rng.integers(1, 9))
        data = rows_of([1] * len(counts), [[1] * n for n in counts])
        ends = np.cumsum(counts)
        examples = rng.integers(0, len(counts), rng.integers(0, 9))
        expected = [j for i in examples for j in range(ends[i] - counts[i], ends[i])]
        numbers = data.responses_of(examples)
        assert numbers.tolist() == expected == data.responses_of(examples.tolist()).tolist()
        assert numbers.dtype == np.int64


def test_an_epoch_is_shuffled_once_and_never_changed_by_a_reader(monkeypatch):
    """Two interleaved runs of two epochs shuffle four times; a step is a part of its shuffle."""
    make = np.random.default_rng
    expected = {(n, e): make([77, e]).permutation(n) for n in (10, 23) for e in (0, 1)}
    shuffled = []

    def count(seed):
        shuffled.append(seed)
        return make(seed)

    monkeypatch.setattr(np.random, "default_rng", count)
    for step in range(2 * steps_per_epoch(23, 4)):
        for n in (10, 23):
            epoch, k = divmod(step, steps_per_epoch(n, 4))
            if epoch < 2:
                examples = step_examples(n, 4, step, 77, True)
                assert examples.tolist() == expected[n, epoch][4 * k : 4 * k + 4].tolist()
                examples[:] = -1  # a caller may write to it
                assert step_examples(n, 4, step, 77, True)[0] >= 0
    assert len(shuffled) == 4


def test_a_step_that_is_kept_does_not_keep_the_shuffle_of_all_rows():
    """KTO keeps the examples of every step: as views they would hold n numbers each."""
    examples = step_examples(1000, 4, 3, 77, True)
    assert examples.base is None and examples.nbytes == 4 * 8


@pytest.mark.parametrize("shuffle", [True, False])
def test_visited_lists_the_examples_of_the_first_steps(shuffle: bool):
    """For every number of steps, within the first epoch and beyond."""
    for steps in range(1, 12):
        chunks = [step_examples(23, 4, step, 5, shuffle) for step in range(steps)]
        assert visited(23, 4, steps, 5, shuffle).tolist() == sorted(set(np.concatenate(chunks)))


@pytest.mark.parametrize("at_once", [1, 2, 7, 1 << 16])
def test_scored_tokens_are_counted_part_by_part(at_once: int, monkeypatch):
    """The sum of `scored` over each response, by a plain loop; empty responses and prompts too."""
    monkeypatch.setattr(data.dataset, "AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    for _ in range(50):
        trees = []
        for _ in range(rng.integers(1, 6)):
            sizes = rng.integers(0, 4, rng.integers(1, 4))
            answers = [([1] * n, rng.integers(0, 2, n).astype(np.uint8)) for n in sizes]
            trees.append(([5] * rng.integers(1, 4), answers))
        wanted = [int(sum(scored)) for _, answers in trees for _, scored in answers]
        assert from_trees(trees).scored_len.tolist() == wanted


def test_counting_scored_tokens_takes_memory_by_responses():
    """Four million tokens: their int64 twins alone would take 32 MB."""
    n, size = 200_000, 20
    trees = Dataset(
        tokens=np.zeros(n * (size + 1), np.int32),
        scored=np.tile(np.repeat([0, 1], [1, size]).astype(np.uint8), n),
        tree_start=np.arange(n + 1) * (size + 1),
        prompt_len=np.ones(n, np.int32),
        response_start=np.arange(n + 1),
        response_len=np.full(n, size, np.int32),
    )
    tracemalloc.start()
    assert (trees.scored_len == size).all()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 25e6
