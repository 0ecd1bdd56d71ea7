"""Tunix's trainers for SFT and DPO in factor form."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from raclora_jax import flax as rl_flax
from raclora_jax._core.spec import Spec, as_spec
from raclora_jax._extras import extra

with extra("tunix"):
    from flax import nnx
    from tunix.sft import utils
    from tunix.sft.dpo.dpo_trainer import DPOTrainer
    from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig


class FactorForm:
    """What a trainer of Tunix does otherwise in factor form.

    Everything else is Tunix's own: its checkpoints, metrics, hooks and evaluation.

    Where ``_moves_by_messages``, the aux of a step is ``(aux, updates)``, by which the
    model is to be moved; a fused step has moved it, and the updates are ``None``.
    """

    _moves_by_messages: bool = False

    optimizer: nnx.Optimizer[Any]
    loss_fn: Callable[..., Any]
    gen_model_input_fn: Callable[[Any], dict[str, Any]]
    _has_aux: bool
    _train_steps: int

    def __init__(
        self,
        model: nnx.Module,
        *args: Any,
        spec: Spec | int,
        training_config: TrainingConfig,
        fused: bool = False,
        **kwargs: Any,
    ) -> None:
        if utils.is_lora_enabled(model):
            raise ValueError(
                "the model has LoRA modules: hand over the plain model, which "
                f"{type(self).__name__} trains through sketches"
            )
        self._spec = as_spec(spec)
        # Tunix would accumulate dense gradients, in arrays of the weights' shapes.
        each = training_config.gradient_accumulation_steps
        alone = copy.copy(training_config)  # replace would derive the number again in RL
        alone.gradient_accumulation_steps = None
        super().__init__(model, *args, training_config=alone, **kwargs)  # type: ignore[call-arg]
        self.config = training_config
        restored = self.optimizer
        _check_accumulation(restored, each)
        self._iter_steps = self._train_steps * (each or 1)
        self.optimizer = rl_flax.Optimizer(model, restored.tx)
        nnx.update(self.optimizer, nnx.state(restored))
        self._fused = fused
        if fused:
            self.create_train_step_fn()  # refuses what a fused step cannot take

    def create_train_step_fn(self) -> Callable[..., Any]:
        """The step: a gradient in factor coordinates, and the update of the model."""
        return self._fused_step() if self._fused else self._step_in_parts()

    def _fused_step(self) -> Callable[..., Any]:
        take = rl_flax.fused_step(self.loss_fn, self.optimizer.tx, has_aux=self._has_aux)

        def step(
            model: nnx.Module, optimizer: rl_flax.Optimizer, inputs: Any
        ) -> tuple[Any, Any, Any]:
            out = take(model, optimizer, **self.gen_model_input_fn(inputs))
            loss, aux = out if self._has_aux else (out, None)
            # No gradient stands to be measured.
            return loss, (aux, None) if self._moves_by_messages else aux, jnp.nan

        return step

    def _step_in_parts(self) -> Callable[..., Any]:
        def step(
            model: nnx.Module, optimizer: rl_flax.Optimizer, inputs: Any
        ) -> tuple[Any, Any, Any]:
            grad_fn = rl_flax.value_and_grad(
                self.loss_fn, self._spec, has_aux=self._has_aux
            )
            out, grads = grad_fn(model, optimizer, **self.gen_model_input_fn(inputs))
            loss, aux = out if self._has_aux else (out, None)
            norm = optax.global_norm(grads)
            if self._moves_by_messages:
                return loss, (aux, optimizer.updates(model, grads)), norm
            optimizer.update(model, grads)
            return loss, aux, norm

        return step


def _check_accumulation(optimizer: nnx.Optimizer[Any], each: int | None) -> None:
    def is_counting(node: Any) -> bool:
        return isinstance(node, optax.MultiStepsState)

    nodes = jax.tree.leaves(optimizer.opt_state, is_leaf=is_counting)
    if each is not None and each > 1 and not any(map(is_counting, nodes)):
        raise ValueError(
            f"gradient_accumulation_steps={each} in factor form is done by the inner "
            "rule, on gradients of the factors' size: "
            f"raclora(..., inner=optax.MultiSteps(optax.scale_by_adam(), {each}))"
        )


class RacLoraTrainer(FactorForm, PeftTrainer):  # type: ignore[misc]
    """``tunix.PeftTrainer`` in factor form: fine-tuning in full rank at LoRA's cost.

    Args:
      model: A plain nnx module, without LoRA modules.
      optimizer: An optax transformation with one ``raclora(...)`` in it. Gradients are
        accumulated by its inner rule, ``optax.MultiSteps(rule, k)``, with ``k`` the
        ``gradient_accumulation_steps`` of the config.
      training_config: As Tunix has it.
      spec: The spec that ``raclora`` was given, keyword only.
      fused: Whether a step updates inside the backward pass; Tunix's metric of the norm
        of the gradient is then not a number. The optimizer is then ``raclora(...)``
        itself, with nothing around it.
      **kwargs: The other arguments of ``PeftTrainer``.

    Raises:
      ValueError: If the model has LoRA modules, or gradients are to be accumulated
        around ``raclora``.

    Example:
      >>> trainer = RacLoraTrainer(  # doctest: +SKIP
      ...     model, rl.raclora(1e-3, spec, key=0), config, spec=spec
      ... ).with_gen_model_input_fn(make_inputs)
      >>> trainer.train(train_ds, eval_ds)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nnx.Module,
        optimizer: optax.GradientTransformation,
        training_config: TrainingConfig,
        *,
        spec: Spec | int,
        fused: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            model,
            optimizer,
            spec=spec,
            training_config=training_config,
            fused=fused,
            **kwargs,
        )


class RacLoraDPOTrainer(FactorForm, DPOTrainer):  # type: ignore[misc]
    """``tunix.DPOTrainer`` in factor form.

    Args:
      model: The policy, a plain nnx module.
      ref_model: The reference, or ``None`` as Tunix has it.
      optimizer: As in ``RacLoraTrainer``.
      training_config: A ``DPOTrainingConfig``.
      spec: The spec that ``raclora`` was given, keyword only.
      fused: Whether a step updates inside the backward pass; Tunix's metric of the norm
        of the gradient is then not a number. The optimizer is then ``raclora(...)``
        itself, with nothing around it.
      **kwargs: The other arguments of ``DPOTrainer``.

    Raises:
      ValueError: As ``RacLoraTrainer``.

    Example:
      >>> trainer = RacLoraDPOTrainer(  # doctest: +SKIP
      ...     policy, reference, rl.raclora(1e-5, spec, key=0), config, spec=spec
      ... )
    """

    def __init__(
        self,
        model: nnx.Module,
        ref_model: nnx.Module | None,
        optimizer: optax.GradientTransformation,
        training_config: TrainingConfig,
        *,
        spec: Spec | int,
        fused: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            model,
            ref_model,
            optimizer,
            spec=spec,
            training_config=training_config,
            fused=fused,
            **kwargs,
        )
