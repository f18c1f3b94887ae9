"""The paper's method once more, naively: one image and one patch at a time, in float64."""

import math

import torch
from diffusers import AutoencoderKL
from torch.testing import assert_close


def draw(model, count=2, seed=2):
    return model.sample_noise(count, generator=torch.Generator().manual_seed(seed))


def naive_gamma_sigma(config, t):
    """The paper's schedules at one t, written out."""
    T = config.num_train_timesteps
    if config.noise_schedule == "linear_sigma":
        return 1, math.sqrt(2) * t / (T - 1)
    if config.noise_schedule == "single_sigma":
        return 1, math.sqrt(1 / 3)
    gamma2 = 1 - (t + 1) / T
    if config.noise_schedule == "ddpm":
        gamma2 = math.prod(1 - (1e-4 + (0.02 - 1e-4) * s / (T - 1)) for s in range(t + 1))
    return math.sqrt(gamma2), math.sqrt(1 - gamma2)


def naive_components(config, w, patch):
    """Every principal component of a patch (D,), divided by its deviation."""
    V, mean, spectrum = (w[f"ldae.tokenizer.{name}"] for name in ("V", "mean", "spectrum"))
    d = config.latent_dim
    rows = w["ldae.tokenizer.residual"] * spectrum[d:, None].sqrt()  # unit rows, before they were divided
    basis = torch.cat([V, rows])
    assert_close(basis @ basis.T, torch.eye(len(basis)).double(), atol=1e-5, rtol=0)
    return torch.stack([basis[i] @ (patch - mean) / spectrum[i].sqrt() for i in range(len(basis))])


def naive_latent_units(config, w, error):
    """sum_i w_i (r_i / s_i)^2 of one patch's error (D,): along every principal component, in units of its deviation."""
    V, scale, d = w["ldae.tokenizer.V"], w["ldae.tokenizer.scale"], config.latent_dim
    if config.whitens_residual:
        return sum((1 if i < d else 0.1) * error[i] ** 2 for i in range(config.patch_dim))
    total = sum((V[i] @ error / scale[i]) ** 2 for i in range(d))
    outside = error - V.T @ (V @ error)
    weight = (
        0.1 if config.prediction == "image" else 1
    )  # with one factor for all, the loss is equation 4's but for its unit
    return total + weight * sum(outside**2) / scale[0] ** 2


def naive_position(row, column, E):
    """The sin-cos position (E,) of a patch."""
    omega = [10000 ** (-k / (E // 4)) for k in range(E // 4)]
    waves = [f(place * o) for place in (column, row) for f in (math.sin, math.cos) for o in omega]
    return torch.tensor(waves).double()


def naive_network(config, w, tokens, t, class_number, kept):
    """The prediction (N, D or d) of embedded tokens (N, E), of which the encoder sees those at the places `kept`."""
    E = config.hidden_size

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def layer_norm(x):
        return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, unbiased=False, keepdim=True) + 1e-6)

    def embed_time(t):
        angles = [t * 10000 ** (-k / 128) for k in range(128)]
        features = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles]).double()
        hidden = linear(features, "ldae.timestep_embedding.fc1")
        return linear(hidden * torch.sigmoid(hidden), "ldae.timestep_embedding.fc2")

    def attention(x, name):
        query, key, value = linear(x, f"{name}.qkv").split(E, dim=1)
        size, heads = E // config.num_attention_heads, []
        for h in range(config.num_attention_heads):
            s = slice(h * size, (h + 1) * size)
            heads.append(torch.softmax(query[:, s] @ key[:, s].T / math.sqrt(size), dim=1) @ value[:, s])
        return linear(torch.cat(heads, dim=1), f"{name}.projection")

    def block(x, c, name):
        shift1, scale1, gate1, shift2, scale2, gate2 = linear(c * torch.sigmoid(c), f"{name}.modulation").split(E)
        x = x + gate1 * attention(layer_norm(x) * (1 + scale1) + shift1, f"{name}.attention")
        hidden = linear(layer_norm(x) * (1 + scale2) + shift2, f"{name}.mlp.fc1")
        return x + gate2 * linear(hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))), f"{name}.mlp.fc2")

    c = embed_time(t)
    if config.num_classes:
        c = c + w["ldae.class_embedding.weight"][class_number]
    places = torch.stack([naive_position(*divmod(i, config.grid_hw[1]), E) for i in range(len(tokens))])
    tokens = tokens[kept]
    for i in range(config.num_hidden_layers):
        tokens = block(tokens, c, f"ldae.layers.{i}")
    tokens = layer_norm(tokens) * w["ldae.layernorm.weight"] + w["ldae.layernorm.bias"]
    if config.keep_ratio < 1:
        every = [w["decoder.mask_token"][0, 0]] * len(places)
        for place, token in zip(kept, tokens, strict=True):
            every[place] = token
        tokens = torch.stack(every) + places
    for i in range(config.decoder_num_hidden_layers):
        tokens = block(tokens, c, f"decoder.layers.{i}")
    shift, scale = linear(c * torch.sigmoid(c), "decoder.modulation").split(E)
    return linear(layer_norm(tokens) * (1 + scale) + shift, "decoder.head")


def naive_loss(model, images, noise, timesteps, classes=None, keep=None):
    """The paper's sections 4.2 to 4.4, one image and one patch at a time, with the full D x D basis; all in float64."""
    config = model.config
    w = {name: tensor.double() for name, tensor in model.state_dict().items()}
    (p, q), D, d = config.patch_hw, config.patch_dim, config.latent_dim
    scale, is_conv = w["ldae.tokenizer.scale"], config.tokenizer_type == "conv_vae"
    if is_conv:  # diffusers by hand; V and the rest are not used
        part = "ldae.tokenizer.autoencoder."
        kl = AutoencoderKL(**config.autoencoder_config).double()
        kl.load_state_dict({name.removeprefix(part): tensor for name, tensor in w.items() if name.startswith(part)})
        latent_images = kl.encode(images.double()).latent_dist.mean.detach()
    mean, U, V = (None if is_conv else w[f"ldae.tokenizer.{name}"] for name in ("mean", "U", "V"))
    if not is_conv:
        V = torch.linalg.qr(torch.cat([V.T, torch.randn(D, D).double()], dim=1)).Q.T  # rows: d, then the rest
        V[:d] = w["ldae.tokenizer.V"]
    if config.tokenizer_type == "pca":
        assert_close(V @ V.T, torch.eye(D).double(), atol=1e-6, rtol=0)

    losses = []
    classes = [config.num_classes] * len(images) if classes is None else classes
    for index, (image, eps, t, class_number) in enumerate(
        zip(images.double(), noise.double(), timesteps.tolist(), classes, strict=True)
    ):
        gamma, sigma = naive_gamma_sigma(config, t)
        loss_weight = 1 / (1 + sigma**2) if gamma == 1 else gamma**2
        targets, tokens = [], []
        for row in range(config.image_hw[0] // p):
            for column in range(config.image_hw[1] // q):
                patch = image[:, row * p : (row + 1) * p, column * q : (column + 1) * q].flatten()
                if is_conv:
                    z0 = latent_images[index, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].flatten() / scale
                else:
                    z0 = V[:d] @ (patch - mean) / scale
                zt = gamma * z0 + sigma * eps[len(targets)]
                seen = zt if config.input_space == "latent" else U @ (zt * scale) + mean
                embedded = seen @ w["ldae.embeddings.projection.weight"].T + w["ldae.embeddings.projection.bias"]
                tokens.append(embedded + naive_position(row, column, config.hidden_size))
                target = {"noise": eps[len(targets)], "latent": z0, "image": patch}
                if config.prediction == "projected_image":
                    target["projected_image"] = U @ (z0 * scale) + mean
                if config.whitens_residual:
                    target = {name: naive_components(config, w, x) for name, x in target.items() if len(x) == D}
                targets.append(target[config.prediction])
        kept = range(len(tokens)) if keep is None else keep[index].tolist()
        for target, prediction in zip(
            targets, naive_network(config, w, torch.stack(tokens), t, class_number, list(kept)), strict=True
        ):
            r = target - prediction
            if config.prediction == "noise":
                losses.append(sum(r**2) / d)
            elif config.predicts_image and config.loss_units == "latent":
                losses.append(loss_weight * naive_latent_units(config, w, r) / D)
            elif config.prediction == "image":
                r = V @ r
                losses.append(loss_weight * sum((1 if i < d else 0.1) * r[i] ** 2 for i in range(D)) / D)
            else:
                losses.append(loss_weight * sum(r**2) / len(r))
    return sum(losses) / len(losses)
