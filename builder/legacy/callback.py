"""The old Keras callback: counts from the start of a training, prints the summary at its end, and closes the shards."""

from __future__ import annotations

from typing import Any

from builder.legacy.manager import GenerativeAugmentationManager


class GenerativeAugmentationCallback:
    """Prints how many synthetic images of each phase a training was served, and cleans up after it.

    It is a Keras callback where TensorFlow or Keras is installed. Elsewhere it has the same methods, for a training
    loop of one's own. The line after every hundred images is printed by the manager itself.
    """

    def __new__(cls, gen_manager: GenerativeAugmentationManager | None = None) -> GenerativeAugmentationCallback:
        return object.__new__(_with_keras(cls))

    def __init__(self, gen_manager: GenerativeAugmentationManager | None = None) -> None:
        """`gen_manager`: whose images are counted; None, as scripts pass it where generation is off: does nothing."""
        super().__init__()
        self.gen_manager = gen_manager

    def on_train_begin(self, logs: Any = None) -> None:
        if self.gen_manager is not None:
            self.gen_manager.served.reset()

    def on_train_end(self, logs: Any = None) -> None:
        if self.gen_manager is None:
            return
        if summary := self.gen_manager.served.summary():
            print(f"\n{summary}\n", flush=True)
        self.gen_manager.cleanup()


class _WithoutKeras:
    """What else a loop may call of a callback."""

    def __init__(self) -> None:
        self.params: Any = None
        self.model: Any = None

    def set_params(self, params: Any) -> None:
        self.params = params

    def set_model(self, model: Any) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        if name.startswith("on_"):
            return lambda *args, **keys: None
        raise AttributeError(f"'{type(self).__name__}' has no attribute '{name}'")


def _with_keras(kind: Any) -> Any:
    """The class with Keras's own Callback as a base, where there is Keras."""
    members = {"__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind, _keras_callback() or _WithoutKeras), members)


def _keras_callback() -> Any:
    """TensorFlow's, which the old script uses; else that of Keras by itself; None without both."""
    try:
        import tensorflow

        return tensorflow.keras.callbacks.Callback
    except ImportError:
        pass
    try:
        import keras

        return keras.callbacks.Callback
    except ImportError:
        return None
