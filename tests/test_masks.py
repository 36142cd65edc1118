"""Sorting samples by length, cutting single ones out, and telling tokens from padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from headstart.errors import DataError
from headstart.statistics.batches import Samples, single_sample
from headstart.statistics.lengths import by_length
from headstart.statistics.masks import TokenMasks, Unmatched, layout_of

PATIENT = settings(deadline=None, max_examples=150)


@st.composite
def token_data(draw, side=None, sizes=None):
    """Batches as collators make them, each padded to its own width, or wider, and what each sample holds."""
    side = side or draw(st.sampled_from(["left", "right"]))
    sizes = sizes or draw(st.lists(st.integers(1, 5), min_size=1, max_size=6))
    pad = draw(st.sampled_from([0, 7, 50256]))
    # Numbers a token beside the ids, and numbers a sample.
    extra = draw(st.sets(st.sampled_from(["position_ids", "token_type_ids", "labels", "score"])))
    dtype = draw(st.sampled_from([torch.int64, torch.int32, torch.bool, torch.float32]))
    chunks, contents, index = [], {}, 0
    for size in sizes:
        rows = []
        for _ in range(size):
            length = draw(st.integers(1, 12))
            row = {
                "input_ids": torch.arange(length) + 100 * (index + 1),
                "attention_mask": torch.ones(length, dtype=dtype),
            }
            if "position_ids" in extra:
                row["position_ids"] = torch.arange(length) + 1
            if "token_type_ids" in extra:
                row["token_type_ids"] = torch.ones(length, dtype=torch.int64)
            if "labels" in extra:
                row["labels"] = row["input_ids"].clone()
                row["labels"][: draw(st.integers(0, length - 1))] = -100
            if "score" in extra:
                row["score"] = torch.tensor(float(index))
            rows.append(row)
            contents[index] = row
            index += 1
        width = max(len(row["input_ids"]) for row in rows) + draw(st.integers(0, 3))
        chunks.append(
            Samples(
                {key: torch.stack([padded(key, row[key], width, side, pad) for row in rows]) for key in rows[0]},
                tuple(range(index - size, index)),
            )
        )
    return chunks, contents, side, pad


def padded(key, value, width, side, pad):
    if value.dim() == 0:
        return value
    missing = width - len(value)
    fill = {"input_ids": pad, "labels": -100}.get(key, 0)
    return functional.pad(value, (missing, 0) if side == "left" else (0, missing), value=fill)


def cells(chunks):
    return sum(chunk.batch["attention_mask"].numel() for chunk in chunks)


@PATIENT
@given(token_data())
def test_sorting_by_length_keeps_the_samples(data):
    chunks, contents, side, pad = data
    before = [{key: value.clone() for key, value in chunk.batch.items()} for chunk in chunks]
    found = by_length(chunks)
    # The data that were handed in are as they were.
    for chunk, batch in zip(chunks, before, strict=True):
        assert all(torch.equal(chunk.batch[key], batch[key]) for key in batch)
    assert sorted(index for chunk in found for index in chunk.indices) == sorted(contents)
    most = max(chunk.size for chunk in chunks)
    assert all(chunk.size <= most for chunk in found)
    assert len(found) <= len(chunks)
    assert cells(found) <= cells(chunks)
    assert max(cells([chunk]) for chunk in found) <= max(cells([chunk]) for chunk in chunks)
    any_padding = any(not bool(chunk.batch["attention_mask"].bool().all()) for chunk in chunks)
    for chunk in found:
        assert chunk.first == chunk.indices[0]
        assert set(chunk.batch) == set(before[0])
        mask = chunk.batch["attention_mask"].bool()
        for row, index in enumerate(chunk.indices):
            length = len(contents[index]["input_ids"])
            keep = mask[row]
            span = slice(mask.shape[1] - length, None) if side == "left" else slice(0, length)
            assert int(keep.sum()) == length and bool(keep[span].all())
            for key, value in contents[index].items():
                held = chunk.batch[key][row]
                assert held.dtype == value.dtype
                assert torch.equal(held if value.dim() == 0 else held[span], value), key
                if value.dim() and key == "labels":
                    assert (held[~keep] == -100).all()
                if value.dim() and key == "input_ids" and any_padding:
                    assert (held[~keep] == pad).all()


@PATIENT
@given(token_data(), st.randoms())
def test_sorting_by_length_finds_the_same_whatever_the_order(data, random):
    chunks, _, _, _ = data
    found = by_length(chunks)
    if [id(chunk) for chunk in found] == [id(chunk) for chunk in chunks]:
        return
    shuffled = list(chunks)
    random.shuffle(shuffled)
    other = by_length(shuffled)
    widths = [[chunk.batch["attention_mask"].shape for chunk in each] for each in (found, other)]
    assert widths[0] == widths[1]
    lengths = [int(mask.sum()) for chunk in found for mask in chunk.batch["attention_mask"]]
    assert lengths == sorted(lengths)


def chunk_of(batch, first=0):
    size = next(len(value) for value in batch.values() if isinstance(value, torch.Tensor))
    return Samples(batch, tuple(range(first, first + size)))


def uneven(side="right"):
    mask = torch.tensor([[1] * 10, [1] * 2 + [0] * 8])
    mask = mask if side == "right" else mask.flip(1)
    return {"input_ids": torch.arange(1, 21).reshape(2, 10) * mask, "attention_mask": mask}


def unchanged(chunks):
    found = by_length(chunks)
    return [id(chunk) for chunk in found] == [id(chunk) for chunk in chunks]


def test_what_it_is_for():
    chunks = [chunk_of(uneven()), chunk_of(uneven(), 2)]
    found = by_length(chunks)
    assert [chunk.indices for chunk in found] == [(1, 3), (0, 2)]
    assert [chunk.batch["input_ids"].shape for chunk in found] == [(2, 2), (2, 10)]


OTHERS = {
    "images": lambda: {"pixel_values": torch.randn(2, 3, 4, 4), "labels": torch.tensor([0, 1])},
    "no mask": lambda: {"input_ids": torch.arange(20).reshape(2, 10)},
    "a mask of pairs": lambda: uneven() | {"attention_mask": torch.ones(2, 1, 10, 10)},
    "a hole": lambda: uneven() | {"attention_mask": torch.tensor([[1] * 4 + [0] * 2 + [1] * 4, [1] * 2 + [0] * 8])},
    "nothing at all": lambda: uneven() | {"attention_mask": torch.tensor([[1] * 10, [0] * 10])},
    "images beside": lambda: uneven() | {"pixel_values": torch.randn(2, 3, 4, 4)},
    "another width": lambda: uneven() | {"labels": torch.ones(2, 4)},
    "a decoder": lambda: uneven() | {"decoder_input_ids": torch.ones(2, 10, dtype=torch.int64)},
    "no tensor": lambda: uneven() | {"return_dict": True},
    "labels on padding": lambda: uneven() | {"labels": torch.arange(20).reshape(2, 10)},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_data_are_left_alone(kind):
    assert unchanged([chunk_of(OTHERS[kind]()), chunk_of(OTHERS[kind](), 2)])


def test_what_does_not_fit_together_is_left_alone():
    assert by_length([]) == []
    assert unchanged([chunk_of(uneven("left")), chunk_of(uneven("right"), 2)])
    assert unchanged([chunk_of(uneven()), chunk_of(uneven() | {"score": torch.ones(2)}, 2)])
    assert unchanged([chunk_of(OTHERS["images"]()), chunk_of(uneven(), 2)])
    # Little to be saved.
    whole = {"input_ids": torch.ones(2, 10, dtype=torch.int64), "attention_mask": torch.ones(2, 10)}
    assert unchanged([chunk_of(whole), chunk_of(whole, 2)])


def test_no_batch_gets_much_larger_than_those_given():
    """Batches of about equal numbers of tokens, as memory allows: many short samples, or few long ones."""
    rows = [[10] * 16] + [[80, 2]] * 16
    chunks, first = [], 0
    for lengths in rows:
        mask = torch.stack([(torch.arange(max(lengths)) < length).long() for length in lengths])
        chunks.append(chunk_of({"input_ids": mask, "attention_mask": mask}, first))
        first += len(lengths)
    assert max(cells([chunk]) for chunk in by_length(chunks)) <= 1.5 * max(cells([chunk]) for chunk in chunks)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_are_full_by_samples_or_by_cells(side):
    """Of the batches given, the largest has 6 samples, and the largest number of cells is 24."""
    rows, chunks, first = [[2] * 6, [8, 1, 1], [12, 3], [7, 8, 5], [9, 1]], [], 0
    for lengths in rows:
        mask = torch.stack([(torch.arange(max(lengths)) < length).long() for length in lengths])
        mask = mask if side == "right" else mask.flip(1)
        chunks.append(chunk_of({"input_ids": mask, "attention_mask": mask}, first))
        first += len(lengths)
    found = by_length(chunks)
    lengths = [chunk.batch["attention_mask"].sum(1).tolist() for chunk in found]
    assert lengths == [[1, 1, 1, 2, 2, 2], [2, 2, 2, 3], [5, 7, 8], [8, 9], [12]]
    flat = [length for each in rows for length in each]
    assert [[flat[index] for index in chunk.indices] for chunk in found] == lengths


# Single samples.


@PATIENT
@given(token_data())
def test_a_single_sample_has_no_padding(data):
    chunks, contents, _, _ = data
    for chunk in chunks:
        for row, index in enumerate(chunk.indices):
            one = single_sample(chunk.batch, row)
            for key, value in contents[index].items():
                assert torch.equal(one[key][0], value), key


def pair(width=10, label_width=8, lengths=(6, 10), answers=(5, 8)):
    mask = torch.stack([(torch.arange(width) < length).long() for length in lengths])
    labels = torch.stack([torch.arange(label_width).where(torch.arange(label_width) < n, -100) for n in answers])
    return {"input_ids": torch.arange(width).repeat(2, 1), "attention_mask": mask, "labels": labels}


def test_a_single_pair_keeps_its_answer():
    one = single_sample(pair(), 0)
    assert one["input_ids"].tolist() == [list(range(6))]
    assert one["labels"][0, :5].tolist() == list(range(5)) and not (one["labels"][0, 5:] != -100).any()


def test_a_single_pair_with_a_decoder_mask_fits_together():
    batch = pair()
    batch["decoder_attention_mask"] = (batch["labels"] != -100).long()
    batch["decoder_input_ids"] = batch["labels"].clamp(min=0)
    for encoder_decoder in (False, True):
        one = single_sample(batch, 0, encoder_decoder=encoder_decoder)
        assert one["labels"].shape == one["decoder_input_ids"].shape == one["decoder_attention_mask"].shape


@PATIENT
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 3),
    st.integers(0, 3),
    st.booleans(),
    st.sampled_from([(), ("decoder_attention_mask",), ("decoder_attention_mask", "decoder_input_ids")]),
)
def test_a_single_pair_has_no_padding_on_either_side(length, answer, more, wider, flip, given_keys):
    """Whatever the widths, equal ones among them, and whichever of the two is longer."""
    batch = pair(9 + more, 9 + wider, (length, 9), (answer, 9))
    batch["input_ids"] = batch["input_ids"] + 50
    if flip:
        batch["input_ids"], batch["attention_mask"] = batch["input_ids"].flip(1), batch["attention_mask"].flip(1)
    batch |= {key: (batch["labels"] != -100).long() for key in given_keys}
    one = single_sample(batch, 0, encoder_decoder=True)
    assert one["input_ids"].tolist() == [sorted(range(50, 50 + length), reverse=flip)]
    assert one["attention_mask"].tolist() == [[1] * length]
    assert one["labels"].tolist() == [list(range(answer))]
    assert all(one[key].tolist() == [[1] * answer] for key in given_keys)


def test_a_single_pair_keeps_what_the_decoders_own_mask_shows():
    batch = pair()
    batch["decoder_attention_mask"] = torch.tensor([[1] * 7 + [0], [1] * 8])
    one = single_sample(batch, 0, encoder_decoder=True)
    assert one["labels"].tolist() == [[0, 1, 2, 3, 4, -100, -100]]
    assert one["decoder_attention_mask"].tolist() == [[1] * 7]


# Masks.


def masks(batch, tokens="attention", *, encoder_decoder=False, alone=False):
    size = len(next(iter(batch.values())))
    return TokenMasks(batch, size, tokens, encoder_decoder=encoder_decoder, alone=alone)


def rows_of(found, count):
    values = torch.arange(count)[:, None]
    return found.of(values).flatten().tolist()


MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
COUNTED = [0, 1, 2, 4, 8, 9, 10, 11]


LAYOUTS = ["tokens", "tokens first", "flat", "samples", "other"]
# The input of a layer for three samples of four tokens, by layout.
FITTING = {"tokens": (3, 4, 5), "tokens first": (4, 3, 5), "flat": (12, 5), "samples": (3, 5)}


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("layout", "shape"), [("tokens", (3, 4, 5)), ("flat", (12, 5))])
def test_padding_is_left_out(layout, shape, dtype):
    found = masks({"attention_mask": MASK.to(dtype)}).match(torch.zeros(shape), layout)
    assert found.count == 8
    assert rows_of(found, 12) == COUNTED


@pytest.mark.parametrize("square", [False, True])
def test_padding_is_left_out_where_the_sequence_comes_first(square):
    """Where there are as many tokens as samples, the shape is that of samples first as well."""
    mask = torch.cat([MASK, torch.tensor([[0, 1, 1, 1]])]) if square else MASK
    values = torch.arange(mask.numel()).reshape(mask.shape)
    found = masks({"attention_mask": mask}).match(values.T[..., None], "tokens first")
    assert found.count == mask.sum()
    assert found.of(values.T.flatten()).sort().values.tolist() == values[mask.bool()].tolist()
    whole = masks({"attention_mask": torch.ones_like(mask)}).match(values.T[..., None], "tokens first")
    assert whole.index is None and whole.count == mask.numel()


def test_one_row_a_sample_counts():
    found = masks({"attention_mask": MASK}).match(torch.zeros(3, 5), "samples")
    assert found.count == 3 and rows_of(found, 3) == [0, 1, 2]


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (layout, shape)
        for layout in LAYOUTS
        for shape in [(7, 5), (4, 3, 5), (3, 2, 4, 5), (3, 5, 5), (1, 5), (3, 4, 5), (12, 5), (3, 5)]
        if FITTING.get(layout) != shape
    ],
)
def test_other_rows_are_not_guessed_at(layout, shape):
    """Nor are rows of another layout than one sample showed, though they may be as many as there are tokens."""
    with pytest.raises(Unmatched):
        masks({"attention_mask": MASK}).match(torch.zeros(shape), layout)
    # Without padding there is nothing to guess.
    found = masks({"attention_mask": torch.ones(3, 4)}).match(torch.zeros(shape), layout)
    assert found.index is None and found.count == torch.zeros(shape).numel() // 5
    # Nor is there another way where the sample is alone, which is told.
    alone = masks({"attention_mask": torch.tensor([[1, 1, 0, 1]])}, alone=True)
    assert alone.match(torch.zeros(shape), layout).index is None
    assert alone.unmatched == ((layout, shape) != ("samples", (1, 5)))


@pytest.mark.parametrize(
    ("shape", "tokens", "layout"),
    [
        ((1, 7, 5), 7, "tokens"),
        ((1, 1, 5), 1, "tokens"),
        # Of another length than the tokens that were given: a decoder's, or patches of an image.
        ((1, 9, 5), 7, "tokens"),
        ((1, 9, 5), 0, "tokens"),
        ((7, 1, 5), 7, "tokens first"),
        ((9, 1, 5), 7, "tokens first"),
        ((7, 5), 7, "flat"),
        ((1, 5), 7, "samples"),
        ((1, 5), 0, "samples"),
        ((3, 5), 7, "other"),
        ((9, 5), 7, "other"),
        ((1, 7, 2, 5), 7, "other"),
        ((5,), 7, "other"),
    ],
)
def test_the_layout_that_one_sample_shows(shape, tokens, layout):
    assert layout_of(shape, tokens) == layout


def test_the_layout_of_a_layer_that_one_sample_did_not_reach():
    assert layout_of(None, 7) == "other"
    with pytest.raises(Unmatched):
        masks({"attention_mask": MASK}).match(torch.zeros(3, 4, 5), layout_of(None, 7))


def test_labels_count_where_they_are_asked_for():
    labels = torch.where(MASK.bool(), torch.arange(4), -100)
    labels[:, 0] = -100
    found = masks({"attention_mask": MASK, "labels": labels}, "labels").match(torch.zeros(3, 4, 5), "tokens")
    assert rows_of(found, 12) == [1, 2, 9, 10, 11]
    found = masks({"attention_mask": MASK, "labels": labels}).match(torch.zeros(3, 4, 5), "tokens")
    assert rows_of(found, 12) == COUNTED


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 1, 2]), torch.ones(3, 4)])
def test_no_labels_of_tokens(labels):
    batch = {"attention_mask": MASK} | ({} if labels is None else {"labels": labels})
    with pytest.raises(DataError, match="tokens='labels'"):
        masks(batch, "labels")


def test_encoder_and_decoder_are_told_apart_by_length():
    labels = torch.tensor([[5, 6, -100], [5, 6, 7], [5, -100, -100]])
    both = masks({"attention_mask": MASK, "labels": labels}, encoder_decoder=True)
    assert rows_of(both.match(torch.zeros(3, 4, 5), "tokens"), 12) == COUNTED
    assert rows_of(both.match(torch.zeros(3, 3, 5), "tokens"), 9) == [0, 1, 3, 4, 5, 6]
    # A mask of the decoder says more than its labels do.
    decoder = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 0, 0]])
    both = masks({"attention_mask": MASK, "labels": labels, "decoder_attention_mask": decoder}, encoder_decoder=True)
    assert both.match(torch.zeros(3, 3, 5), "tokens").count == 7
    # Of one length but with different padding nothing tells them apart.
    wide = functional.pad(labels, (0, 1), value=-100)
    with pytest.raises(Unmatched):
        masks({"attention_mask": MASK, "labels": wide}, encoder_decoder=True).match(torch.zeros(3, 4, 5), "tokens")
    same = torch.where(MASK.bool(), 5, -100)
    found = masks({"attention_mask": MASK, "labels": same}, encoder_decoder=True).match(torch.zeros(3, 4, 5), "tokens")
    assert rows_of(found, 12) == COUNTED
