"""Gradient matching: how well candidate images explain an observed gradient, in batches.

Li et al., CVPR 2022, equation 3: the distance between the observed gradient and the attacker's
replica of the defense on the candidate's gradient. Distances are relative to the observed norm, so
that a trained model's small gradients are compared as those of a fresh one.

Where the defense treats each value by itself and the model's layers are known, distances are summed
up layer by layer (:mod:`ggl_audit.attack.layer_wise`); elsewhere whole gradients are computed.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch.func import vmap

from ggl_audit.attack.layer_wise import LayerWise, layer_wise
from ggl_audit.basics.gradient import (
    Gradient,
    each,
    norm,
    repeated,
    stack,
    take,
    unstack,
)
from ggl_audit.client.gradients import MEMORY, ClientGradients, in_less_memory
from ggl_audit.defenses import Drawn, Pipeline, relative_l2
from ggl_audit.inputs.model import ClientModel

Distance = Literal["likelihood", "l2", "cosine"]

DENSE, FEW_INPUTS = 3, 7
"""Dimensions of a stack of weights of dense layers; the most inputs that keep their mean."""


def cosine(replica: Gradient, observed: Gradient) -> torch.Tensor:
    """One minus the cosine between the two, a scalar in [0, 2]."""
    inner = torch.stack([(replica[name] * observed[name]).sum() for name in observed]).sum()
    return 1 - inner / (norm(replica) * norm(observed)).clamp(min=1e-30)


class Matching:
    """Compares candidate images with observed gradients.

    A candidate is one image, or a set of n x B images where each of n clients has B. Labels tell
    which: (..., ) for images, (..., n x B) for sets.

    Args:
        model: the client's model, and how it is trained.
        defense: the declared defense, replicated on each candidate's gradient.
        distance: ``likelihood``, the best statistic under the declared noise
            (``Pipeline.likelihood``); or ``l2`` or ``cosine``, between replica and capture.
        memory: bytes that candidates' gradients may take at a time, about. Where the device has
            fewer, the chunks are halved until they fit.
    """

    def __init__(
        self,
        model: ClientModel,
        defense: Pipeline,
        distance: Distance = "likelihood",
        memory: int = MEMORY,
    ) -> None:
        self.model = model
        self.defense = defense
        self.distance = distance
        self.clients = ClientGradients(model, defense, memory)
        measure = relative_l2 if distance == "l2" else cosine

        def compare(gradients: Gradient, observed: Gradient, known: Gradient) -> torch.Tensor:
            clients = unstack(gradients)
            if distance == "likelihood":
                return defense.likelihood.mismatch(clients, observed, known or None)
            return measure(defense.replica.replicate(clients, observed, known or None), observed)

        # The inner map runs over the candidates of one observation, the outer over observations.
        self._distances = vmap(vmap(compare, in_dims=(0, None, None)))

    @functools.cached_property
    def _layer_wise(self) -> LayerWise | None:
        """The way layer by layer, where it is known to be exact."""
        if self.model.statistics is not None:
            return None
        best = self.distance == "likelihood"
        side = self.defense.likelihood if best else self.defense.replica
        by_cosine = self.distance == "cosine"
        return layer_wise(
            self.model, side.value_wise(), by_cosine, self.clients.gradients, self.clients.memory
        )

    def halve_chunks(self) -> bool:
        """Takes half as many candidates at a time; False where that is one already."""
        way = self.__dict__.get("_layer_wise")
        fewer = self.clients.halve_chunks()
        if way is None or way.chunk == 1:
            return fewer
        way.chunk = max(1, way.chunk // 2)
        return True

    def seen_of(self, observed: Gradient) -> Gradient | None:
        """What of a release this model computes, which in another mode keeps other statistics.

        Returns:
            None where the release holds statistics that this model would not have changed.
        """
        own = self.model.statistics
        names = {*self.model.parameters, *(() if own is None else own.names)}
        if any(bool(tensor.any()) for name, tensor in observed.items() if name not in names):
            return None
        return {name: tensor for name, tensor in observed.items() if name in names}

    @in_less_memory
    def distances(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        observed: Gradient,
        others: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """The distances of n candidates to each of t observed gradients, every one its own n.

        Args:
            images: (t, n, channels, height, width) in [0, 1], or (t, n, k, ...) for sets.
            labels: (t, n) or (t, n, k).
            observed: tensors with a leading dimension t.
            others: images (t, m, ...) and labels (t, m) of the clients that are known; the
                candidates are then sets for those that are not.

        Returns:
            (t, n).
        """
        if labels.ndim == 2:
            images, labels = images[:, :, None], labels[:, :, None]
        way = self._layer_wise if labels.shape[2] == 1 and others is None else None
        if way is not None:
            return way.distances(images[:, :, 0], labels[:, :, 0], observed)
        return self._by_gradients(images, labels, observed, others)

    @in_less_memory
    def residual_products(
        self, images: torch.Tensor, labels: torch.Tensor, observed: Gradient
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Compares n candidates with each of t observed gradients, and with each other.

        See :meth:`LayerWise.residual_products`. None where gradients have to be held for that.

        Args:
            images: (t, n, k, channels, height, width) in [0, 1].
            labels: (t, n, k).
            observed: tensors with a leading dimension t.
        """
        _, candidates, members = labels.shape
        way = self._layer_wise if members == 1 else None
        if way is None or not way.holds(candidates) or not self.defense.replica.is_smooth:
            return None
        return way.residual_products(images[:, :, 0], labels[:, :, 0], observed)

    def _by_gradients(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        observed: Gradient,
        others: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """See :meth:`distances`; of sets (t, n, k, ...)."""
        trials, candidates, members = labels.shape
        most = max(1, self.clients.chunk // max(1, members // self.model.batch_size))
        if candidates > most:
            parts = [
                self._by_gradients(
                    images[:, i : i + most], labels[:, i : i + most], observed, others
                )
                for i in range(0, candidates, most)
            ]
            return torch.cat(parts, dim=1)
        together = max(1, most // candidates)
        distances = []
        for start in range(0, trials, together):
            part = slice(start, start + together)
            seen = {name: tensor[part] for name, tensor in observed.items()}
            known = {} if others is None else self._known(others[0][part], others[1][part], seen)
            with torch.no_grad():
                guesses = vmap(self.defense.replica.guesses)(seen)
                tried = [
                    self._distances(self.of_clients(images[part], labels[part], guess), seen, known)
                    for guess in guesses
                ]
            distances.append(torch.stack(tried).amin(0))
        return torch.cat(distances)

    @in_less_memory
    def distances_in_turn(
        self,
        candidates: torch.Tensor,
        labels: torch.Tensor,
        others: torch.Tensor,
        observed: Gradient,
    ) -> torch.Tensor:
        """The distances of sets that differ from a given one in one image.

        Each of k images has n candidates, which take its place one after the other. Where gradients
        add up (:attr:`adds_up`) that takes the k x n gradients of the candidates, and k more.

        Args:
            candidates: (t, k, n, channels, height, width) in [0, 1].
            labels: (t, k).
            others: (t, k, channels, height, width), the given set.
            observed: tensors with a leading dimension t.

        Returns:
            (t, k, n).
        """
        trials, members, count = candidates.shape[:3]
        together = max(1, self.clients.chunk // (members * count))
        distances = []
        for start in range(0, trials, together):
            part = slice(start, start + together)
            seen = {name: tensor[part] for name, tensor in observed.items()}
            with torch.no_grad():
                tried = [
                    self._in_turn(candidates[part], labels[part], others[part], seen, guess)
                    for guess in vmap(self.defense.replica.guesses)(seen)
                ]
            distances.append(torch.stack(tried).amin(0))
        return torch.cat(distances)

    def agreement(
        self, images: torch.Tensor, labels: torch.Tensor, observed: Gradient
    ) -> torch.Tensor:
        """How well the replica of one candidate's gradient agrees with each of t observed ones.

        Args:
            images: (t, channels, height, width) in [0, 1], or (t, k, ...) for sets.
            labels: (t,) or (t, k).
            observed: k - 1 tensors with a leading dimension t.

        Returns:
            (t, k), the cosine for each tensor in the model's order, and for the whole gradient. Of
            a dense layer's weight it is without the mean of each row, which no order of what the
            layer takes changes, and which is large where that is positive.
        """
        replicas = self.replicas(images, labels, observed)

        def cosine(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
            one, other = one.reshape(len(one), -1), other.reshape(len(other), -1)
            lengths = one.norm(dim=1) * other.norm(dim=1)
            found: torch.Tensor = (one * other).sum(1) / lengths.clamp(min=1e-30)
            return found

        def centred(tensor: torch.Tensor) -> torch.Tensor:
            is_dense = tensor.ndim == DENSE and tensor.shape[2] > FEW_INPUTS
            return tensor - tensor.mean(2, keepdim=True) if is_dense else tensor

        wholes = [
            torch.cat([of[name].reshape(len(of[name]), -1) for name in observed], dim=1)
            for of in (replicas, observed)
        ]
        apart = [cosine(centred(replicas[name]), centred(observed[name])) for name in observed]
        return torch.stack([*apart, cosine(*wholes)], dim=1)

    def replicas(self, images: torch.Tensor, labels: torch.Tensor, observed: Gradient) -> Gradient:
        """What t candidates give under the attacker's replica, by the best guess of the draws.

        Args:
            images: (t, channels, height, width) in [0, 1], or (t, k, ...) for sets.
            labels: (t,) or (t, k).
            observed: tensors with a leading dimension t.

        Returns:
            Tensors with a leading dimension t.
        """
        if labels.ndim == 1:
            images, labels = images[:, None], labels[:, None]

        def replicate(gradients: Gradient, observed: Gradient) -> Gradient:
            return self.defense.replica.replicate(unstack(take(gradients, 0)), observed)

        with torch.no_grad():
            guesses = vmap(self.defense.replica.guesses)(observed)
            found: list[Gradient] = [
                vmap(replicate)(self.of_clients(images[:, None], labels[:, None], guess), observed)
                for guess in guesses
            ]
            if len(found) == 1:
                return found[0]
            away = torch.stack([vmap(relative_l2)(one, observed) for one in found])
            best = away.argmin(0).tolist()
            return stack([take(found[guess], index) for index, guess in enumerate(best)])

    def of_clients(self, images: torch.Tensor, labels: torch.Tensor, guess: Drawn) -> Gradient:
        """The gradients (t, n, k / B) of (t, n, k) images, with what is guessed of t draws."""
        batch_size = self.model.batch_size
        trials, candidates, members = labels.shape
        shape = (trials, candidates, max(1, members // batch_size))
        times = shape[1] * shape[2]
        drawn = {name: tensor.repeat_interleave(times, dim=0) for name, tensor in guess.items()}
        size = members // shape[2]
        gradients = self.clients.gradients(
            images.reshape(-1, size, *images.shape[3:]), labels.reshape(-1, size), drawn
        )
        return {name: tensor.unflatten(0, shape) for name, tensor in gradients.items()}

    def _in_turn(
        self,
        candidates: torch.Tensor,
        labels: torch.Tensor,
        others: torch.Tensor,
        observed: Gradient,
        guess: Drawn,
    ) -> torch.Tensor:
        """See :meth:`distances_in_turn`, by one guess of what each of t clients drew."""
        trials, members, count = candidates.shape[:3]
        batch_size, share = self.model.batch_size, self.clients.share
        # From here on the leading dimension is t x k, as each image has candidates of its own.
        seen, drawn = repeated(observed, members), repeated(guess, members)
        candidates, labels = candidates.flatten(0, 1), labels.flatten()
        own = self.clients.gradients(others.flatten(0, 1), labels, drawn)
        own = each(lambda tensor: share * tensor, own)
        clients = each(lambda tensor: tensor.unflatten(0, (-1, batch_size)).sum(1), own)
        whole = repeated(clients, batch_size)
        rest = {name: whole[name] - own[name] for name in own}
        known: Gradient = {}
        if members > batch_size:
            shares = vmap(
                lambda gradient, observed: self.defense.replica.share([gradient], observed)
            )(clients, repeated(observed, members // batch_size))

            def of_other_clients(share: torch.Tensor) -> torch.Tensor:
                releases = share.unflatten(0, (trials, -1))
                others: torch.Tensor = releases.sum(1, keepdim=True) - releases
                return others.reshape_as(share)

            known = repeated(each(of_other_clients, shares), batch_size)

        def compared(part: slice, images: torch.Tensor) -> torch.Tensor:
            mine, target, rest_of_client, rest_of_cohort = (
                each(lambda tensor: tensor[part], tensors) for tensors in (drawn, seen, rest, known)
            )
            width = images.shape[1]
            gradients = self.clients.gradients(
                images.flatten(0, 1),
                labels[part].repeat_interleave(width),
                repeated(mine, width),
            )
            sets = {
                name: torch.add(
                    rest[:, None], gradients[name].unflatten(0, (-1, width)), alpha=share
                )
                for name, rest in rest_of_client.items()
            }
            one_client = each(lambda tensor: tensor[:, :, None], sets)
            distances: torch.Tensor = self._distances(one_client, target, rest_of_cohort)
            return distances

        rows = []
        together = max(1, self.clients.chunk // count)
        for start in range(0, len(labels), together):
            part = slice(start, start + together)
            columns = candidates[part].split(self.clients.chunk, dim=1)
            rows.append(torch.cat([compared(part, images) for images in columns], dim=1))
        return torch.cat(rows).reshape(trials, members, count)

    def _known(self, images: torch.Tensor, labels: torch.Tensor, observed: Gradient) -> Gradient:
        if labels.shape[1] == 0:
            return {}
        with torch.no_grad():
            guess = vmap(self.defense.replica.guesses)(observed)[0]
            gradients = self.of_clients(images[:, None], labels[:, None], guess)

            def share(gradients: Gradient, observed: Gradient) -> Gradient:
                return self.defense.replica.share(unstack(take(gradients, 0)), observed)

            return vmap(share)(gradients, observed)
