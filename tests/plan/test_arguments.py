"""Bad input to builders: the exception names the argument."""

import pytest
import torch

from vdit_fast.plan import block_causal, dense, from_block_mask, from_classes, from_clusters, from_mask, windows3d

B22 = torch.ones(2, 2, dtype=torch.bool)
LABELS = torch.tensor([0, 1, 1])
CLUSTERS = (B22[None, None], torch.tensor([[[2, 1]]]), torch.tensor([[[0, 3]]]), torch.arange(3), torch.arange(3))


def clusters(index: int, value: object) -> tuple[object, ...]:
    return (*CLUSTERS[:index], value, *CLUSTERS[index + 1 :])


WRONG = [
    (lambda: dense(0), ValueError, "lq must be at least 1, got 0"),
    (lambda: dense(-3), ValueError, "lq"),
    (lambda: dense(3, 0), ValueError, "lk"),
    (lambda: dense(3.0), TypeError, "lq must be an int, got float"),
    (lambda: dense(3, heads=0), ValueError, "heads"),
    (lambda: dense(3, q_tile=0), ValueError, "q_tile"),
    (lambda: from_block_mask(B22.float(), 4, 4), TypeError, "mask must be a torch.bool tensor, got torch.float32"),
    (lambda: from_block_mask([[True]], 4, 4), TypeError, "mask must be a torch.bool tensor, got list"),
    (lambda: from_block_mask(B22[0], 4, 4), ValueError, "mask must be"),
    (lambda: from_block_mask(B22[:0], 4, 4), ValueError, "not empty"),
    (lambda: from_block_mask(B22, 0, 4), ValueError, "q_block must be at least 1"),
    (lambda: from_block_mask(B22, 4, True), TypeError, "kv_block"),
    (lambda: from_block_mask(B22, 4, 4, lq=9), ValueError, "lq = 9 needs 3 blocks of q_block = 4"),
    (lambda: from_block_mask(B22, 4, 4, lk=4), ValueError, "lk = 4 needs 1 blocks"),
    (lambda: from_block_mask(B22, 4, 4, lq=-1), ValueError, "lq"),
    (lambda: from_block_mask(B22, [4, 4, 4], 4), ValueError, "q_block must be one length or 2"),
    (lambda: from_block_mask(B22, 4, [4.0, 4.0]), ValueError, "kv_block must be one length or 2 integer"),
    (lambda: from_block_mask(B22, 4, [[4, 4]]), ValueError, "kv_block"),
    (lambda: from_block_mask(B22, [5, -1], 4), ValueError, "q_block holds -1"),
    (lambda: from_block_mask(B22, [5, 1], 4, lq=7), ValueError, "q_block sum to 6, but the sequence has 7"),
    (lambda: from_block_mask(B22, [0, 0], 4), ValueError, "q_block sum to 0"),
    (lambda: from_block_mask(B22, 4, 4, q_order=torch.arange(9)), ValueError, "lq = 9"),
    (lambda: from_block_mask(B22, 4, 4, lq=7, q_order=torch.arange(8)), ValueError, "lq is 7 but the order has 8"),
    (lambda: from_block_mask(B22, 4, 4, q_order=torch.arange(8.0)), TypeError, "q_order must be an int32 or int64"),
    (lambda: from_block_mask(B22, 4, 4, q_order=torch.zeros(8).int()), ValueError, "q_order is not a permutation"),
    (lambda: from_block_mask(B22, 4, 4, kv_order=torch.arange(1, 9)), ValueError, "kv_order is not a permutation"),
    (lambda: from_block_mask(B22, 4, 4, q_order=torch.arange(8)[None]), ValueError, r"q_order must be \[L\]"),
    (
        lambda: from_block_mask(B22.expand(3, 2, 2), 4, 4, q_order=torch.arange(8).expand(1, 2, 8)),
        ValueError,
        "q_order has shape .* heads 3",
    ),
    (lambda: from_block_mask(B22, 4, 4, q_order=torch.arange(8, device="meta")), ValueError, "q_order is on meta"),
    (lambda: from_clusters(*clusters(0, B22)), ValueError, "map must be bool"),
    (lambda: from_clusters(*clusters(1, torch.tensor([[2, 1]]))), ValueError, "q_sizes must be integer"),
    (lambda: from_clusters(*clusters(1, torch.tensor([[[2, 2]]]))), ValueError, "q_sizes sum to 4"),
    (lambda: from_clusters(*clusters(2, torch.tensor([[[4, -1]]]))), ValueError, "kv_sizes holds -1"),
    (lambda: from_clusters(*clusters(2, torch.tensor([[[1.0, 2.0]]]))), ValueError, "kv_sizes must be integer"),
    (lambda: from_clusters(*clusters(2, torch.ones(1, 2, 2).long())), ValueError, "kv_sizes has shape"),
    (lambda: from_clusters(*clusters(3, None)), ValueError, "needs q_order and kv_order"),
    (lambda: from_clusters(*clusters(4, torch.tensor([0, 0, 1]))), ValueError, "kv_order is not a permutation"),
    (lambda: from_classes(B22.int(), LABELS), ValueError, "allow must be bool"),
    (lambda: from_classes(B22[None], LABELS), ValueError, "allow must be bool"),
    (lambda: from_classes(B22, LABELS + 1), ValueError, "q_labels range from 1 to 2, but allow has 2"),
    (lambda: from_classes(B22, LABELS, LABELS - 1), ValueError, "kv_labels range from -1"),
    (lambda: from_classes(B22, LABELS.float()), ValueError, "q_labels must be integer"),
    (lambda: from_classes(B22, LABELS[None, None]), ValueError, "q_labels must be integer"),
    (lambda: from_classes(B22, LABELS.expand(2, 3), LABELS.expand(3, 3)), ValueError, "q_labels has batch 2"),
    (lambda: from_mask(torch.ones(3, 3)), TypeError, "mask must be a torch.bool"),
    (lambda: from_mask(B22, block=(0, 64)), ValueError, r"block\[0\]"),
    (lambda: from_mask(B22, block=(64,)), ValueError, "block must be"),
    (lambda: windows3d((2, 2), (1, 1, 1)), ValueError, "grid must be three sizes"),
    (lambda: windows3d((2, 2, 0), (1, 1, 1)), ValueError, r"grid\[2\] must be at least 1"),
    (lambda: windows3d((2, 2, 2), (1, -1, 1)), ValueError, r"window\[1\]"),
    (lambda: windows3d((2, 2, 2), (1, 1, 1), tile=(0, 1, 1)), ValueError, r"tile\[0\]"),
    (lambda: windows3d((2, 2, 2), (2, 2, 2), shift=(1, 0, 0)), ValueError, "in mode 'partition' only"),
    (lambda: windows3d((4, 4, 4), (2, 2, 2), shift=(2, 0, 0), mode="partition"), ValueError, "0 <= shift < window"),
    (lambda: windows3d((4, 4, 4), (2, 2, 2), shift=(0, -1, 0), mode="partition"), ValueError, "0 <= shift < window"),
    (lambda: windows3d((4, 4, 4), (2, 2, 2), mode="cyclic"), ValueError, "mode must be .* got 'cyclic'"),
    (lambda: windows3d((4, 4, 4), (2, 2, 2), text=-1), ValueError, "text"),
    (lambda: windows3d((21, 45, 80), (3, 3, 3), tile=(1, 1, 1)), ValueError, "use a larger tile"),
    (lambda: block_causal([]), ValueError, "block_sizes"),
    (lambda: block_causal([0, 0]), ValueError, "at least one token"),
    (lambda: block_causal([3, -1]), ValueError, "block_sizes"),
    (lambda: block_causal([3, 1.5]), ValueError, "block_sizes"),
    (lambda: block_causal([3], window=0), ValueError, "window must be at least 1"),
    (lambda: block_causal([3], sinks=-1), ValueError, "sinks"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_bad_arguments(case):
    call, kind, message = WRONG[case]
    with pytest.raises(kind, match=message):
        call()
