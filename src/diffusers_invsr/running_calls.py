"""What each running call keeps for itself, so that calls in several threads or tasks do not disturb one another."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(eq=False)
class CallState:
    """What diffusers' callbacks read and set on a pipeline while it runs."""

    guidance_scale: float = 1.0
    num_timesteps: int = 0
    interrupt: bool = False


# Of the innermost call of each pipeline (by its `id`) in this thread or task
_RUNNING: ContextVar[Mapping[int, CallState]] = ContextVar("invsr_running_calls", default=MappingProxyType({}))


class RunningCallsMixin:
    """
    Gives a pipeline the attributes that diffusers' callbacks know: within a call those of that call, outside of any
    those of the call that ended last.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._running_calls, self._last_call = [], CallState()

    @contextmanager
    def running_call(self, **state) -> Iterator[CallState]:
        """Until the end of the block, the attributes are those of a new call."""
        call = CallState(**state)
        token = _RUNNING.set({**_RUNNING.get(), id(self): call})
        self._running_calls.append(call)
        try:
            yield call
        finally:
            self._running_calls.remove(call)
            self._last_call = call
            _RUNNING.reset(token)

    def running_step(self, guidance_scale: float) -> AbstractContextManager[CallState]:
        """The call that a step belongs to, or a new one for a step that is called alone."""
        call = _RUNNING.get().get(id(self))
        if call is None:
            return self.running_call(guidance_scale=guidance_scale)
        call.guidance_scale = guidance_scale  # a callback may have changed it in the step before
        return nullcontext(call)

    @property
    def _call_state(self) -> CallState:
        return _RUNNING.get().get(id(self), self._last_call)

    @property
    def guidance_scale(self) -> float:
        return self._call_state.guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._call_state.guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        return self._call_state.num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._call_state.interrupt

    # What callbacks set
    @property
    def _guidance_scale(self) -> float:
        return self._call_state.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, value: float):
        self._call_state.guidance_scale = value

    @property
    def _interrupt(self) -> bool:
        return self._call_state.interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool):
        # From a callback, of the call that it belongs to; from elsewhere, such as a user interface, of all
        current = _RUNNING.get().get(id(self))
        for call in [*self._running_calls] if current is None else [current]:
            call.interrupt = value
