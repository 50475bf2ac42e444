"""Decode over a row whose keys and values lie on two ranks: gloo on the CPU; a GPU for each and "nccl" elsewhere."""

import tempfile

import torch

from santa.distributed import decode_context_parallel, shard_rows


def step(rank, directory):
    torch.distributed.init_process_group("gloo", f"file://{directory}/store", rank=rank, world_size=2)
    start, end = shard_rows(24576, 2)[rank]  # [start, end) of the row's keys are here
    q, (k, v) = torch.ones(1, 32, 128), torch.randn(2, 1, end - start, 8, 128) + 1.0  # q is the same on all ranks
    lens = torch.tensor([[end - start], [24576], [start]], dtype=torch.int32)
    out, lse = decode_context_parallel(q, k, v, kv_lens=lens[0], whole_lens=lens[1], shard_starts=lens[2])
    print(f"rank {rank}, keys {start} to {end}: out {out[0, 0, 0]:.4f}, lse {lse[0, 0]:.4f} of the whole row")
    torch.distributed.destroy_process_group()  # a rank that ends with its group open can abort


if __name__ == "__main__":
    torch.multiprocessing.spawn(step, (tempfile.mkdtemp(),), nprocs=2)
