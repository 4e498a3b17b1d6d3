"""How long something takes as a straight line of its size: learned online, from samples that may lie.

T(x) = base + slope·x is the latency model of ServerlessLoRA (arXiv 2505.14468, section 4.2), where x is the batch; here
x is whatever the caller counts, mostly prompt tokens. The fit is weighted least squares with exponential forgetting, in
relative errors, so that a prompt of ten tokens matters as much as one of ten thousand. A sample far off what was
expected is clipped (Huber, 1964) by a running estimate of the usual error; several in a row on one side are no
outliers but a world that has changed: they count in full, and what was known before counts for little.
"""

from __future__ import annotations

import math

OUTLIER = 3.0  # usual errors
USUAL_AT_FIRST, USUAL_AT_LEAST = 0.5, 0.05  # errors as logarithms of ratios; never more than at first
TINY = 1e-9
IN_A_ROW = 3
CHANGED = 0.3  # what earlier samples keep of their weight at each further one in a row


class LatencyModel:
    """`base_s` and `slope_s` are the first guess: it weighs as much as one sample, for ever, so that what the samples
    cannot tell (the slope, when all have one size) stays as it was guessed."""

    def __init__(self, base_s: float, slope_s: float, *, forgetting: float = 0.98) -> None:
        if not (base_s > 0 and slope_s >= 0 and math.isfinite(base_s + slope_s)):
            raise ValueError(f"a guess of {base_s} s and {slope_s} s each: give a positive base and no negative slope")
        if not 0 < forgetting <= 1:
            raise ValueError(
                f"forgetting {forgetting}: give the weight that a sample keeps at the next one, above 0 to 1"
            )
        self._guess = (base_s, slope_s)
        self._forgetting = forgetting
        self._base_s, self._slope_s = base_s, slope_s
        self._usual = USUAL_AT_FIRST
        self._row = 0  # outliers in a row; negative: too short ones
        self._num_observed = 0
        self._weight = self._mean_x = self._mean_y = 0.0  # unweighted by error: the scale of things
        self._s = self._sx = self._sy = self._sxx = self._sxy = 0.0  # weighted sums

    @property
    def base_s(self) -> float:
        return self._base_s

    @property
    def slope_s(self) -> float:
        return self._slope_s

    @property
    def num_observed(self) -> int:
        return self._num_observed

    def predict(self, x: float) -> float:
        return self._base_s + self._slope_s * x

    def observe(self, x: float, seconds: float) -> None:
        assert x >= 0 and 0 <= seconds < math.inf, (x, seconds)
        self._num_observed += 1
        expected = self.predict(x)
        # Relative to the larger of the two: an absurd guess in either direction must not weigh more than real samples.
        scale = max(expected, seconds, TINY)
        seconds = self._clipped(expected, seconds)
        weight = 1.0 / (scale * scale)
        keep = self._forgetting * (CHANGED if abs(self._row) >= IN_A_ROW else 1.0)
        self._weight = keep * self._weight + 1.0
        self._mean_x += (x - self._mean_x) / self._weight
        self._mean_y += (seconds - self._mean_y) / self._weight
        self._s = keep * self._s + weight
        self._sx = keep * self._sx + weight * x
        self._sy = keep * self._sy + weight * seconds
        self._sxx = keep * self._sxx + weight * x * x
        self._sxy = keep * self._sxy + weight * x * seconds
        self._fit()

    def _clipped(self, expected: float, seconds: float) -> float:
        # As a ratio: half the time is as far off as double, and a slow spell is left behind as fast as it was learned.
        error = math.log(max(seconds, TINY) / max(expected, TINY))
        limit = OUTLIER * self._usual
        if abs(error) > limit:
            side = 1 if error > 0 else -1
            self._row = self._row + side if self._row * side > 0 else side
            if abs(self._row) < IN_A_ROW:
                seconds = expected * math.exp(side * limit)
        else:
            self._row = 0
        # Bounded on both sides: one absurd sample must not make the next one look usual.
        self._usual += 0.1 * (min(abs(error), limit) - self._usual)
        self._usual = min(max(self._usual, USUAL_AT_LEAST), USUAL_AT_FIRST)
        return seconds

    def _fit(self) -> None:
        """Minimise Σ w·(y − base − slope·x)² + the guess's pull on each of the two, over base >= 0 and slope >= 0."""
        guess_base, guess_slope = self._guess
        pull_base = max(guess_base, self._mean_y, TINY) ** -2
        pull_slope = (self._mean_x / max(guess_slope * self._mean_x, self._mean_y, TINY)) ** 2
        s, sxx = self._s + pull_base, self._sxx + pull_slope
        sy, sxy = self._sy + pull_base * guess_base, self._sxy + pull_slope * guess_slope
        determinant = s * sxx - self._sx * self._sx
        if sxx <= 0 or determinant <= 0:  # only sizes of 0 so far
            base, slope = sy / s, guess_slope
        else:
            base = (sxx * sy - self._sx * sxy) / determinant
            slope = (s * sxy - self._sx * sy) / determinant
        if slope < 0:
            base, slope = sy / s, 0.0
        elif base < 0:
            base, slope = 0.0, sxy / sxx
        self._base_s, self._slope_s = base, slope
