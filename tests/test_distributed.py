import multiprocessing

import pytest
import torch
import torch.distributed as dist

from grpo_core.distributed import ranks


def rows(rank, width):
    return torch.arange(rank * 10, rank * 10 + (3 * rank) ** 2 % 5 * width, dtype=torch.float).view(-1, width)


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    torch.save([ranks.all_rows(rows(rank, width)) for width in (1, 2)], f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_all_rows_joins_different_numbers_of_rows_in_the_order_of_ranks(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["grpo_core.distributed.ranks"])
    processes = [context.Process(target=worker, args=(rank, str(tmp_path))) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    for rank in range(3):
        for width, joined in zip((1, 2), torch.load(tmp_path / f"{rank}.pt"), strict=True):
            assert torch.equal(joined, torch.cat([rows(other, width) for other in range(3)]))
    assert [len(rows(rank, 1)) for rank in range(3)] == [0, 4, 1]


def test_alone_it_is_the_rows():
    assert torch.equal(ranks.all_rows(torch.ones(2, 3)), torch.ones(2, 3))
