"""The exceptions of the package, grouped by what the reader can do about them.

    SmartSplitError
    ├── InvalidRoute          the route does not fit the chain: choose another cut
    ├── NotSplittable         the model cannot be read as a chain: change the model
    ├── InvalidTask           the task's functions or examples do not fit together
    ├── InvalidPlan           a recompute plan does not fit the route: make a new one
    ├── NoFeasibleRoute       no route fits a budget: more memory or a smaller batch
    ├── NoFeasiblePlan        no recompute plan fits: another route, or more memory
    ├── MemoryCapExceeded     a step exceeded its cap: tighter plan or earlier cut
    ├── RefusedMove           a cut cannot move now: the session goes on unmoved
    ├── RefusedReply          one client's reply cannot be merged: look at that client
    └── EdgeError             something between a device and its edge
        ├── EdgeUnreachable       the edge does not answer: wait, or use another
        ├── StaleSession          the edge restarted or closed the session: start over
        ├── OutOfOrderStep        a step was skipped or changed: the session is lost
        ├── StateNotHeld          the edge lacks a global state: send it again
        ├── EdgeFull              the edge lacks memory or disk: wait, or use another
        ├── RefusedMessage        bytes that are not a message, or an unsupported value
        ├── RefusedTail           a tail cannot be sealed: its client drops out
        └── TailLost              sealed tails are gone: their clients are dropped

Every exception has its numbers as attributes and survives pickling, since it may travel
from an edge to a device.
"""


def bytes_text(num_bytes: int) -> str:
    """Write a size for a person, in the largest unit that leaves three digits.

    Examples
    --------
    >>> bytes_text(830), bytes_text(64 * 2**20)
    ('830 B', '64 MiB')
    """
    size, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if abs(size) < 1000:  # noqa: PLR2004 - three digits
            break
        size, unit = size / 1024, larger
    return f"{num_bytes} B" if unit == "B" else f"{size:.3g} {unit}"


class SmartSplitError(Exception):
    """Base of every error this package raises.

    Parameters
    ----------
    message : str
        What happened, against what, and what to do next.
    **facts : object
        The numbers and names behind the message, kept as attributes.
    """

    def __init__(self, message: str, **facts: object) -> None:
        super().__init__(message)
        self.__dict__.update(facts)


class InvalidRoute(SmartSplitError):
    """A route that cannot be laid along a chain."""


class NotSplittable(SmartSplitError):
    """A model that cannot be read as a chain of units."""


class InvalidTask(SmartSplitError):
    """A task whose functions or examples do not fit together."""


class NoFeasibleRoute(SmartSplitError):
    """No route fits the budget.

    Attributes
    ----------
    needed_bytes, budget_bytes : int
        The least that would do, and what there is.
    """

    needed_bytes: int
    budget_bytes: int


class InvalidPlan(SmartSplitError):
    """A recompute plan that cannot run, or not on this route."""


class NoFeasiblePlan(SmartSplitError):
    """No recompute plan of a route fits the budget.

    Attributes
    ----------
    needed_bytes, budget_bytes : int
        The least that would do on this route, and what there is.
    """

    needed_bytes: int
    budget_bytes: int


class MemoryCapExceeded(SmartSplitError):
    """Live tensors exceeded the cap.

    Attributes
    ----------
    client : str
        Whose memory it was.
    operator, phase : str
        The operator that exceeded the cap, and the phase: building, forward, loss,
        backward or optimizer.
    live_bytes, budget_bytes : int
        What was alive after the operator, and what was allowed.
    bytes_by_kind : dict[str, int]
        The live bytes by what they are for, the largest first.
    """

    client: str
    operator: str
    phase: str
    live_bytes: int
    budget_bytes: int
    bytes_by_kind: dict[str, int]


class RefusedMove(SmartSplitError):
    """A cut cannot be moved between two steps; the session goes on unchanged."""


class RefusedReply(SmartSplitError):
    """A reply that must not be merged; ``kind`` says why in one word."""

    kind: str


class EdgeError(SmartSplitError):
    """Base of what can go wrong between a device and its edge."""


class EdgeUnreachable(EdgeError):
    """The edge does not answer, or is being restarted."""


class StaleSession(EdgeError):
    """The edge does not know the session: it restarted, or closed it."""


class OutOfOrderStep(EdgeError):
    """A step arrived that is neither the next one nor a repetition of the last."""


class StateNotHeld(EdgeError):
    """The edge holds no global state under the digest asked for."""


class EdgeFull(EdgeError):
    """An edge lacks memory or disk for a session within its budgets.

    Attributes
    ----------
    needed_bytes, free_bytes, budget_bytes : int
        What the session takes, what is left, and what there is for all of them.
    retry_after_seconds : float or None
        When to ask again; None where waiting does not help in this round.
    """

    needed_bytes: int
    free_bytes: int
    budget_bytes: int
    retry_after_seconds: float | None


class RefusedMessage(EdgeError):
    """Bytes that are not a request or reply, or a value that neither can carry."""


class RefusedTail(EdgeError):
    """A tail that must not be sealed: not finite, or with a wrong number of steps."""


class TailLost(EdgeError):
    """Sealed tails that are gone or changed; ``sessions`` names them."""

    sessions: tuple[str, ...]
