"""Folders of rounded weights whose layers have all numbers of bits side by side."""

from mka.recipe import QuantizeSettings
from mka.transforms.formats import describe_scheme
from mka.transforms.packing import find_linear, round_rows, write_packed


def write_mixed(source, folder, *, group_size=32, embeddings="off", shard=5 << 30):
    """Round a checkpoint to nearest, by bits that nobody chose."""
    settings = QuantizeSettings(
        scheme="mixed", rounding="gptq", bits_per_weight=5, group_size=group_size, embeddings=embeddings
    )
    chosen = mix_bits(source)

    def pack(spec, info, read):
        return round_rows(source, describe_scheme(chosen[info.name], group_size), spec, info, read)

    write_packed(source, folder, settings, chosen, pack, max_shard_bytes=shard)
    return folder


def mix_bits(source):
    """All numbers of bits side by side; the readers of one norm have the same."""
    chosen, units = {}, 0
    for layer in range(source.layers):
        for part in source.family.parts:
            for names in part.fused:
                own = {source.family.layer_tensor(layer, f"{name}.weight") for name in names}
                chosen |= dict.fromkeys(own & source.tensors.keys(), f"int{8 - units % 7}")
                units += 1
    assert chosen.keys() == {info.name for info in find_linear(source)} and len(set(chosen.values())) == 7
    return chosen
