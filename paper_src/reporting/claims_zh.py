"""The claims in Chinese, by name; their numbers and verdicts are those of :mod:`paper_src.claims`."""

from dataclasses import dataclass, replace

from paper_src.reporting import reported


@dataclass(frozen=True)
class Words:
    """A claim's sentences: what was reported, what we find, when it holds, and the part that repeats."""

    reported: str
    ours: str
    rule: str
    each: str = ""


RECOMMENDS = Words(
    "悬而未决：在真实推荐数据（MovieLens、Amazon）上质量能保持吗？",
    "在抽样用户上训练、对全部物品排序，最小的模型保留了：{each}。",
    "在每个数据集上区间下端达到完整模型 NDCG@10 的 95%，高于最热门物品，且高于没有任何层的同样训练：否则各层不起作用",
    "{dataset}：NDCG@10 {ndcg10:.4f}，为完整模型的 {share_of_full:.0%} [{share_lo:.0%}, {share_hi:.0%}]，速度为其 "
    "{speedup:.2f} 倍（没有任何层 {bare:.4f}，其比 [{over_no_layers_lo:.2f}, {over_no_layers_hi:.2f}]；最热门 {popular:.4f}；"
    "SASRec 同样用户 {same:.4f}；全部用户：SASRec {everyone:.4f}，无层 {bare_everyone:.4f}）",
)

PRUNED = Words(
    "悬而未决：裁层是否优于同样大小的剪枝？",
    "在 k = {k} 的大小下、经过同样的短蒸馏（至多 {seconds:.0f} 秒；裁层先重新拟合，其他方法从原样开始）：裁层的困惑度为完整模型的 "
    "{cut:.2f} [{cut_lo:.2f}, {cut_hi:.2f}] 倍、速度 {cut_x:.2f} 倍，收窄各层 {width:.2f} [{width_lo:.2f}, {width_hi:.2f}]、"
    "{width_x:.2f}，低秩 {thin:.2f} [{thin_lo:.2f}, {thin_hi:.2f}]、{thin_x:.2f}（其后最低者：{best}，{best_ppl:.2f}）。把一半权重置零（Wanda，"
    "未经训练）并不使模型变小：{zeros:.2f}、{zeros_x:.2f}。",
    "在 3 倍速度下，在该大小的所有方法中困惑度最低，且区间低于每个不裁层的方法",
)

QUANTIZED = Words(
    "悬而未决：裁层是否优于量化？",
    "未经训练的 int8 权重：困惑度为完整模型的 {int8:.3f} 倍 [{int8_lo:.3f}, {int8_hi:.3f}]，速度 {int8_x:.2f} 倍，占 float32 字节数的 "
    "{int8_share:.0%}；k = {k}，已修复（第 5 节）：{cut:.2f} [{cut_lo:.2f}, {cut_hi:.2f}]、{cut_x:.2f}、{cut_share:.0%}；"
    "后者再用 int8：{both:.2f}、{both_x:.2f}、{both_share:.0%}。",
    "按区间，最小的模型的困惑度达到 int8 权重的困惑度",
)

WORDS = {
    "first-and-last": Words(
        "最重要的层是最前面的 9 层和最后 1 层（32 层中的 10 层）。",
        "换算到 {depth} 层：按我们的综合得分，最好的 {of} 层中有 {overlap} 层属于这一模式；按 Fisher 信息，{of} 层中有 {fisher} 层"
        "（两半文本之间的 tau 为 {tau:.2f}），随机期望为 {chance:.1f} 层；按综合得分，首层排第 {first_rank}，末层在 {depth} 层中排第 {last_rank}。",
        "按两种得分都达到该模式的 80%",
    ),
    "recommended-layers": Words(
        "分布式选择推荐 32 层中的第 " + "、".join(map(str, reported.RECOMMENDED)) + " 层。",
        "按相对深度换算后，Fisher 信息选中的 {of} 层中有 {fisher} 层在其中，我们的综合得分选中的层中有 {combined} 层（随机期望 {chance:.1f} 层）。",
        "两种得分都选中其中 75% 的层",
    ),
    "speed-of-recommended": Words(
        f"保留 32 层中的 8 层（层压缩比 {reported.LAYER_COMPRESSION:.2f}）时，速度为完整模型的 {reported.SPEEDUP:.2f} 倍。",
        "k = {k}：隐藏状态预填充的速度为 {speedup:.2f} 倍 [{speedup_lo:.2f}, {speedup_hi:.2f}]，"
        "为理想值 {ideal:.2f} 的 {share_of_ideal:.0%}。",
        "区间达到所报告的加速比",
    ),
    "speed-range": Words(
        f"在所有配置下加速比为 {reported.SPEEDUP_RANGE[0]}-{reported.SPEEDUP_RANGE[1]}，"
        f"层压缩比为 {reported.COMPRESSION_RANGE[0]}-{reported.COMPRESSION_RANGE[1]}。",
        "k = {k}（层数除以 {compression}）：隐藏状态预填充 {hidden_low:.2f}-{hidden_high:.2f}；未裁剪的输出头占一份时（带 logits 的预填充、解码）"
        "{head_low:.2f}-{head_high:.2f}。",
        "在这些压缩比下没有一项慢于所报告的范围",
    ),
    "parameters": Words(
        f"保留 32 层中的 8 层使参数量除以 {reported.PARAMETER_COMPRESSION:.2f}。",
        "k = {k}：参数量除以 {parameter_compression:.2f}，层数除以 {layer_compression:.2f}；词嵌入和输出头不被裁剪。",
        "至少为所报告的倍数",
    ),
    "cosine-means-something": Words(
        f"紧凑模型与完整模型的余弦相似度为 {reported.COSINE_RANGE[0]}-{reported.COSINE_RANGE[1]}，被解读为保留了部分语义。",
        "k = {k}：推荐的一类为 {own:.2f}（各梯度得分为 {low:.2f}-{high:.2f}），但一个常数向量就达到 {trivial:.2f}；"
        "去中心余弦 {own_centred:.2f}，困惑度为完整模型的 {own_ppl:times} 倍（常数：{trivial_ppl:times} 倍）。",
        "高于常数向量的余弦",
    ),
    "cosine-target": Words(
        f"目标是余弦相似度高于 {reported.COSINE_TARGET}。",
        "k = {k}，不训练：所有选择中最好的达到 {best:.2f}（去中心 {best_centred:.2f}，困惑度为完整模型的 {best_ppl:times} 倍）。",
        "任何一种选择高于目标",
    ),
    "gradient-scores-select": Words(
        "Fisher 信息和梯度范数高的层就是应当保留的层。",
        "按梯度得分和综合得分，{top_k} 个不同的 Top-K 选择中有 {top_k_better} 个的困惑度低于随机选择（p <= 0.05），{top_k_worse} "
        "个比大多数随机抽取更差；分散到整个深度时，{distributed} 个中有 {distributed_better} 个更好、{distributed_worse} 个更差。",
        "多于一半的 Top-K 选择优于随机（p <= 0.05）",
    ),
    "distributed-beats-top-k": Words(
        "把保留的层分散到整个深度上优于 Top-K。",
        "按梯度得分和综合得分，在 {of} 个不同的对（得分与 k）中，分布式的困惑度在 {wins} 对中更低；按激活统计量，在 {activation_of} 对中有 "
        "{activation_wins} 对。",
        "在两类得分的对中都有 75% 困惑度更低",
    ),
    "fisher-says-what-layers-are-worth": Words(
        "Fisher 信息和梯度范数说明哪些层重要；SHAP 被跳过。",
        "Fisher 与去掉单层后的损失的 Kendall tau 为 {loo:.2f} [{loo_lo:.2f}, {loo_hi:.2f}]，与 Shapley 值为 {shapley:.2f} "
        "[{shapley_lo:.2f}, {shapley_hi:.2f}]；最接近逐层剔除的是 {best}（{best_tau:.2f}，与 Shapley {best_shapley:.2f}）。",
        "两个区间都高于 0.5",
    ),
    "first-and-last-are-worth-most": Words(
        "在没有 SHAP 的得分下，最重要的层是最前面的 9 层和最后 1 层。",
        "直接问模型本身：去掉后损失最大的 {of} 层中有 {leave_one_out} 层、Shapley 值最高的 {of} 层中有 {shapley} 层属于该模式"
        "（标准误至多为最大值的 {relative_error:.1%}，{coalitions:,} 个层子集）。",
        "两者都达到该模式的 80%",
    ),
    "recommended-is-best": Words(
        "分布式选择就是应当推荐的选择。",
        "k = {k}，测试文本：困惑度为完整模型的 {own:times} 倍，余弦 {own_cosine:.2f}；在验证文本上选出的层 {chosen_kept}"
        "（{name}）为 {chosen:times} 倍，余弦 {chosen_cosine:.2f}。",
        "困惑度不高于验证文本所选的结果",
    ),
    "cosine-after-recovery": Words(
        f"悬而未决：微调保留的层能使余弦高于 {reported.COSINE_TARGET} 吗？",
        "k = {k}，闭式修复 {refit:,} 个 token，蒸馏 {distil:,} 个（各轮都计）：余弦 {cosine:.2f}（去中心 {centred:.2f}，常数 {trivial:.2f}），"
        "首选 token 相同的比例 {agreement:.0%}，困惑度为完整模型的 {ppl:.2f} 倍（修复前 {cut:times}），各类文本平均 {mean:.2f} 倍；"
        "k = {large_k}：余弦 {large_cosine:.2f}，{large_ppl:.2f} 倍。",
        "最小的模型在测试文本上达到目标",
    ),
    "cosine-after-longer-recovery": Words(
        f"悬而未决：微调能使余弦高于 {reported.COSINE_TARGET} 吗？预算更大时。",
        "k = {k}，闭式修复 {refit:,} 个 token，蒸馏 {distil:,} 个（各轮都计）：余弦 {cosine:.2f}（去中心 {centred:.2f}），首选 token 相同的比例 "
        "{agreement:.0%}，困惑度为完整模型的 {ppl:.2f} 倍，各类文本平均 {mean:.2f} 倍。",
        "最小的模型在测试文本上达到目标",
    ),
    "against-pruning": PRUNED,
    "against-pruning-with-more-training": replace(
        PRUNED, reported="悬而未决：裁层是否优于同样大小的剪枝？预算更大时。"
    ),
    "against-quantization": QUANTIZED,
    "against-quantization-with-more-training": replace(QUANTIZED, reported="悬而未决：裁层是否优于量化？预算更大时。"),
    "recommendation": RECOMMENDS,
    "recommendation-with-more-users": replace(
        RECOMMENDS, reported="悬而未决：在真实推荐数据上质量能保持吗？更多用户。"
    ),
}
