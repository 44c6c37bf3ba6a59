"""`train.py` that also writes down what each of its processes trained on.

python -m tests.gqe_jax.recorded DIRECTORY [CONFIG] [--field value ...]
"""

import pathlib
import sys

import jax
import numpy as np

import train
from gqe_jax.training import loop as trainer
from tests.gqe_jax.jobs import checksum


def main() -> None:
    """Records the rows on this process's devices, as they are fed to the train step."""
    directory = pathlib.Path(sys.argv.pop(1))
    directory.mkdir(parents=True, exist_ok=True)
    batches, batch_on_devices = trainer.training_batches, trainer.global_batch
    step = 0

    def training_batches(*args, start, **kwargs):
        nonlocal step
        step = start
        return batches(*args, start=start, **kwargs)

    def global_batch(sharding, batch_size, batch):
        nonlocal step
        made = batch_on_devices(sharding, batch_size, batch)
        with (directory / f"{jax.process_index()}.txt").open("a") as file:
            for shard in made.inputs.addressable_shards:
                rows = range(batch_size)[shard.index[0]]
                for row, tokens in zip(rows, np.asarray(shard.data), strict=True):
                    file.write(f"{step} {row} {checksum(tokens)}\n")
        step += 1
        return made

    trainer.training_batches, trainer.global_batch = training_batches, global_batch
    train.main()


if __name__ == "__main__":
    main()
