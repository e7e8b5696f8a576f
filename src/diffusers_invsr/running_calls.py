"""What each running call keeps for itself, so that calls in several threads or tasks do not disturb one another."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
_STATES: ContextVar[Mapping[int, CallState]] = ContextVar("invsr_call_states", default=MappingProxyType({}))


class RunningCallsMixin:
    """Gives a pipeline the attributes that diffusers' callbacks know, each for the call that they are asked in."""

    @contextmanager
    def running_call(self, **state) -> Iterator[CallState]:
        """Until the end of the block, attributes are those of a call of its own."""
        call = CallState(**state)
        token = _STATES.set({**_STATES.get(), id(self): call})
        self._running_calls.append(call)
        try:
            yield call
        finally:
            self._running_calls.remove(call)
            _STATES.reset(token)

    @property
    def _call_state(self) -> CallState:
        if id(self) not in _STATES.get():  # a step is called alone
            _STATES.set({**_STATES.get(), id(self): CallState()})
        return _STATES.get()[id(self)]

    @property
    def guidance_scale(self) -> float:
        return self._call_state.guidance_scale

    @property
    def _guidance_scale(self) -> float:
        return self._call_state.guidance_scale

    @_guidance_scale.setter
    def _guidance_scale(self, value: float):
        self._call_state.guidance_scale = value

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._call_state.guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        return self._call_state.num_timesteps

    @property
    def interrupt(self) -> bool:
        return self._call_state.interrupt

    @property
    def _interrupt(self) -> bool:
        return self._call_state.interrupt

    @_interrupt.setter
    def _interrupt(self, value: bool):
        # From a callback, of the call that it belongs to; from elsewhere, such as a user interface, of all
        current = _STATES.get().get(id(self))
        for call in [current] if current in self._running_calls else [*self._running_calls]:
            call.interrupt = value
