"""Seeds for what is drawn from several numbers alone, such as the run's seed and the step."""

import numpy as np


def mix_seed(*numbers: int) -> int:
    """Mixes several numbers into one seed in [0, 2^63). Zeros at the end of the numbers change nothing."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
