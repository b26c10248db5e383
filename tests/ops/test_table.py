"""TensorTable: every element in exactly one chunk, addresses that follow the tensors, refusals that lose nothing."""

import gc
import weakref

import pytest
import torch
from builders.messages import says
from hypothesis import given, settings
from hypothesis import strategies as st

from ops.tables import arrange
from rsaft_fast.abi.table import LISTS, ROW
from rsaft_fast.ops import CHUNK, TensorTable


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 3 * CHUNK), min_size=1, max_size=8))
def test_chunks_cover_every_element_once(sizes):
    table = TensorTable([torch.empty(size) for size in sizes])
    covered = [0] * len(sizes)
    for tensor, index in zip(table.chunk_tensor.tolist(), table.chunk_index.tolist()):
        assert index * CHUNK == covered[tensor]  # in order, no gap, no overlap
        covered[tensor] += min(CHUNK, sizes[tensor] - covered[tensor])
    assert covered == sizes
    assert table.numel.tolist() == sizes


def test_addresses_are_the_tensors_own_and_zero_where_absent():
    weights = [torch.randn(4), torch.randn(5)]
    table = TensorTable(weights)
    table.bind(grad=[None, torch.randn(5)])
    assert table.addresses[ROW["weight"]].tolist() == [w.data_ptr() for w in weights]
    assert table.addresses[ROW["grad"]].tolist() == [0, table["grad"][1].data_ptr()]


def test_nothing_is_uploaded_unless_an_address_moved():
    grads = [torch.randn(4), torch.randn(5)]
    table = TensorTable([torch.randn(4), torch.randn(5)])
    table.bind(grad=grads)
    table.addresses.fill_(-1)
    table.bind(grad=grads)
    assert (table.addresses == -1).all()
    moved = [grads[0], grads[1].clone()]
    table.bind(grad=moved)
    assert table.addresses[ROW["grad"]].tolist() == [g.data_ptr() for g in moved]
    assert (table.addresses[[row for name, row in ROW.items() if name != "grad"]] == -1).all()


def test_a_table_owned_by_a_graph_refuses_moved_addresses():
    grads = [torch.randn(4)]
    table = TensorTable([torch.randn(4)])
    table.bind(grad=grads)
    table.captured = True
    table.bind(grad=grads)
    known = table.addresses.clone()
    with pytest.raises(RuntimeError, match=says("grad", "graph", "zero_grad(set_to_none=False)")):
        table.bind(grad=[grads[0].clone()])
    assert torch.equal(table.addresses, known)


def test_released_gradients_are_freed():
    table = TensorTable([torch.randn(4)])
    grad = torch.randn(4)
    gone = weakref.ref(grad)
    table.bind(grad=[grad])
    table.release("grad")
    del grad
    gc.collect()
    assert gone() is None
    with pytest.raises(KeyError, match=says("'grad'", "bound: weight")):
        table["grad"]


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "misaligned"])
def test_dense_layouts_are_taken(layout):
    weights = [arrange(torch.randn(2, 3, 4, 5), layout), arrange(torch.randn(6, 7), layout)]
    table = TensorTable(weights)
    table.bind(grad=[torch.empty_like(w) for w in weights])


def test_strides_of_dimensions_of_length_one_do_not_matter():
    weight = torch.randn(4, 1, 3)
    TensorTable([weight]).bind(grad=[torch.randn(4, 3).as_strided((4, 1, 3), (3, 77, 1))])


def test_an_expanded_or_holey_weight_is_refused():
    for bad in (torch.randn(3, 1).expand(3, 4), torch.randn(6, 8)[:, ::2], torch.randn(6, 8)[:, :4]):
        with pytest.raises(ValueError, match=says("weight 1", "strides", ".contiguous()")):
            TensorTable([torch.randn(2), bad])


def test_overlapping_weights_are_refused():
    base = torch.randn(10)
    with pytest.raises(ValueError, match=says("weights 0 and 2", "overlap")):
        TensorTable([base[:6], torch.randn(3), base[5:]])
    TensorTable([base[:5], base[5:]])


def test_other_bad_weights_are_refused():
    with pytest.raises(ValueError, match=says("TensorTable", "at least one")):
        TensorTable([])
    with pytest.raises(TypeError, match=says("weight 1", "float16", "float32")):
        TensorTable([torch.randn(2), torch.randn(2).half()])
    with pytest.raises(TypeError, match=says("weight 0", "int64")):
        TensorTable([torch.zeros(2, dtype=torch.int64)])
    with pytest.raises(TypeError, match=says("weight 0", "sparse")):
        TensorTable([torch.eye(3).to_sparse()])
    with pytest.raises(ValueError, match=says("weight 1", "meta", "cpu")):
        TensorTable([torch.randn(2), torch.randn(2, device="meta")])


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (lambda: torch.randn(3, 4).to_sparse(), TypeError, says("grad 1", "sparse")),
        (lambda: torch.randn(3, 4, device="meta"), ValueError, says("grad 1", "meta", "cpu")),
        (lambda: torch.randn(3, 4).half(), TypeError, says("grad 1", "torch.float16", "torch.float32")),
        (lambda: torch.randn(4, 3), ValueError, says("grad 1", "(4, 3)", "(3, 4)")),
        (lambda: torch.randn(4, 3).t(), ValueError, says("grad 1", "strides", "(1, 3)", "(4, 1)")),
        (lambda: torch.randn(3, 1).expand(3, 4), ValueError, says("grad 1", "strides", "(1, 0)", "(4, 1)")),
    ],
)
def test_a_gradient_that_does_not_fit_is_refused_and_nothing_changes(bad, error, message):
    table = TensorTable([torch.randn(2), torch.randn(3, 4)])
    good = [torch.randn(2), torch.randn(3, 4)]
    table.bind(grad=good)
    known = table.addresses.clone()
    with pytest.raises(error, match=message):
        table.bind(grad=[torch.randn(2), bad()])
    assert torch.equal(table.addresses, known)
    assert all(a is b for a, b in zip(table["grad"], good))


def test_lists_of_the_wrong_length_or_name_are_refused():
    table = TensorTable([torch.randn(2)])
    with pytest.raises(ValueError, match=says("grad", 2, 1)):
        table.bind(grad=[None, None])
    with pytest.raises(ValueError, match=says("'gradient'", ", ".join(LISTS))):
        table.bind(gradient=[None])
