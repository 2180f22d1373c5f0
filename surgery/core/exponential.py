"""exp in float64 by a fixed sequence of elementwise operations: the same bits on any machine and device.

torch's own has other bits in the body that is computed by vectors than in the rest.
"""

import math

from torch import Tensor

from surgery.core.arithmetic import power_of_two
from surgery.core.polynomial import polynomial

# e^x = 2^n e^r, where |r| is at most ln 2 / 2, about 0.3466. In units u = 2^-53 of the value, which are half an ulp or
# more: x - n * _HIGH is exact, as n * _HIGH has 43 bits; subtracting n * _LOW rounds by 0.35 u. The polynomial leaves
# out r^14 / 14! and more, 0.06 u. Its coefficients are off by 0.01 u together. Its last sum rounds by u, and what two
# operations for each k before it round is carried to 2 r^k / k! e^(r / (k + 1)) u, all together 0.98 u of a value
# that is at least 0.707. Powers of two round nothing: 0.35 + 0.06 + 0.01 + 1 + 1.4 units.
RELATIVE_ERROR = 3 * 2.0**-53


def exp(x: Tensor) -> Tensor:
    """e^x of float64 values, within RELATIVE_ERROR of it in float64's normal range; each step an operation of its own.

    Below that range it is rounded once more, and then 0; above, infinity.
    """
    x = x.clamp(_LOWEST, _HIGHEST)
    n = (x * _PER_LN2).round()
    r = (x - n * _HIGH) - n * _LOW
    value = polynomial(r, _COEFFICIENTS)
    half = (n.detach() / 2).floor()  # 2^n itself may be no float64
    return value * power_of_two(half) * power_of_two(n.detach() - half)


_LOWEST, _HIGHEST = -760.0, 720.0  # e^x is 0 and infinity there
_PER_LN2 = 1 / math.log(2)
_HIGH = float.fromhex("0x1.62e42feep-1")  # ln 2 to 32 bits
_LOW = float.fromhex("0x1.a39ef35793c76p-33")  # the rest of it
_COEFFICIENTS = [1 / math.factorial(k) for k in range(14)]
