"""The exceptions of the package; each says what the reader can do about it.

Every exception has its numbers as attributes and survives pickling, since it may travel
from an edge to a device.
"""


def bytes_text(num_bytes: int) -> str:
    """Write a size for a person, in the largest unit that leaves three digits."""
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
    """The route does not fit the chain: choose another cut."""


class NotSplittable(SmartSplitError):
    """The model cannot be read as a chain of units: change the model."""


class InvalidTask(SmartSplitError):
    """The task's functions or examples do not fit together."""


class NotExact(SmartSplitError):
    """The chain does not train as the stock module does, so nothing is trained."""

    unit: str  # That differs first; empty if none stands out
    tensor: str
    trial: str  # Route, recomputation and move that show it


class NoFeasibleRoute(SmartSplitError):
    """No route fits the budget: more memory or a smaller batch would help.

    Attributes
    ----------
    needed_bytes, budget_bytes : int
        The least that would do, and what there is.
    """

    needed_bytes: int
    budget_bytes: int


class InvalidPlan(SmartSplitError):
    """A recompute plan cannot run, or not on this route: make a new one."""


class NoFeasiblePlan(SmartSplitError):
    """No recompute plan of a route fits the budget: use another route, or more memory.

    Attributes
    ----------
    needed_bytes, budget_bytes : int
        The least that would do on this route, and what there is.
    """

    needed_bytes: int
    budget_bytes: int


class MemoryCapExceeded(SmartSplitError):
    """Live tensors exceeded the cap: a tighter plan or an earlier cut would help."""

    client: str  # Whose memory it was
    operator: str  # The operator that exceeded the cap
    phase: str  # building, forward, loss, backward or optimizer
    live_bytes: int  # After the operator
    budget_bytes: int  # What was allowed
    bytes_by_kind: dict[str, int]  # The live bytes by their use, the largest first


class RefusedMove(SmartSplitError):
    """A cut cannot move between these two steps; the session goes on unchanged."""


class RefusedReply(SmartSplitError):
    """A client's reply must not be merged; ``kind`` says why in one word."""

    kind: str


class EdgeError(SmartSplitError):
    """Something went wrong between a device and its edge."""


class EdgeUnreachable(EdgeError):
    """The edge does not answer, or is restarting: wait, or use another."""


class StaleSession(EdgeError):
    """The edge restarted, or closed the session: start over."""


class OutOfOrderStep(EdgeError):
    """A step is neither the next nor a repeat of the last: the session is lost."""


class StateNotHeld(EdgeError):
    """The edge holds no global state under this digest: send it again."""


class EdgeFull(EdgeError):
    """The edge lacks memory or disk for a session: wait, or use another.

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


class RefusedRequest(EdgeError):
    """Not for whoever asks, or more than the strategy has planned for this session."""


class SuspectEdge(EdgeError):
    """An edge's gradients do not fit the loss it reports: nothing more goes to it.

    Attributes
    ----------
    place : str
        The edge.
    dependence : float
        How far its gradients depend on the labels, beyond what the boundary explains.
    num_batches : int
        Over how many batches that is the mean.
    """

    place: str
    dependence: float
    num_batches: int


class RefusedTail(EdgeError):
    """A tail is not finite, or had a wrong number of steps: its client drops out."""


class TailLost(EdgeError):
    """Sealed tails are gone or changed: the clients of ``sessions`` drop out."""

    sessions: tuple[str, ...]
