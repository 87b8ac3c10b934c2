// softmax(scale q k^T) v, by blocks of keys with running sums (Milakov and Gimelshein, arXiv:1805.02867; Dao et al.,
// arXiv:2205.14135).
//
// Queries are the columns of panels; keys, and then the dimensions of the values, are the rows that the micro-kernel
// multiplies. So the maximum and the sum over keys go down the columns without a step across lanes, and the weights
// lie as the second product reads them.

#include "attention/arguments.h"
#include "common/product.h"
#include "common/vec_transpose.h"

namespace dd::DD_ISA {

using attention::Arguments;
using attention::Plan;
using attention::Tokens;

DD_INLINE Operand head_of(const Tokens& tokens, int64_t head, int64_t heads) {
    const int64_t offset = head / heads * tokens.sample_stride + head % heads * tokens.head_stride;
    const int64_t size = tokens.dtype == DType::float32 ? 4 : 2;
    return {const_cast<char*>(static_cast<const char*>(tokens.data) + offset * size), 0, tokens.dtype};
}

// Packs keys and values [first, last) of a head. Rows beyond the keys are zeros.
DD_INLINE void pack_tokens(const Arguments& a, const Plan& plan, int64_t head, int64_t first, int64_t last,
                           Packed* packed) {
    const Operand k = head_of(a.k, head, a.shape.heads), v = head_of(a.v, head, a.shape.heads);
    Packed* values = packed + plan.head_keys;
    for (int64_t key = first; key < last; ++key) {
        const bool is_key = key < a.shape.keys;
        for_vectors(a.shape.depth, [&](int64_t i, int64_t left) DD_INLINE_LAMBDA {
            put_row(packed + key * plan.depth + i, is_key ? read(k, key * a.k.token_stride + i, left) : Vec{});
        });
        for_vectors(a.shape.outputs, [&](int64_t i, int64_t left) DD_INLINE_LAMBDA {
            put_columns(values, key, i, is_key ? read(v, key * a.v.token_stride + i, left) : Vec{}, plan.values);
        });
    }
}

// Packs `count` queries as the columns of a panel.
DD_INLINE void pack_queries(const Arguments& a, int64_t head, int64_t first, int64_t count, Packed* panel) {
    const Operand q = head_of(a.q, head, a.shape.heads);
    for (int64_t column = 0; column < count; column += kLanes) {
        const int64_t here = count - column < kLanes ? count - column : kLanes;
        for_vectors(a.shape.depth, [&](int64_t i, int64_t left) DD_INLINE_LAMBDA {
            Vec rows[kLanes];
            for (int64_t r = 0; r < kLanes; ++r) {
                rows[r] = r < here ? read(q, (first + column + r) * a.q.token_stride + i, left) : Vec{};
            }
            transpose(rows);
            for (int64_t j = 0; j < kLanes; ++j) put_columns(panel, i + j, column, rows[j]);
        });
    }
}

// Per column of a panel: the largest score so far, the sum of weights so far, and by what the sums of earlier blocks
// are multiplied, as their weights were relative to a smaller maximum. Lies in a thread's workspace.
template <int vectors>
struct Softmax {
    Vec largest[vectors], sum[vectors], factor[vectors];

    // Takes the scores [keys][kPanel] of a block in, scale / ln 2 times which are the exponents of their weights.
    DD_INLINE void take(const float* scores, int64_t keys, float scale, bool is_first) {
        for (int v = 0; v < vectors; ++v) {
            Vec before = largest[v], most = is_first ? load(scores + v * kLanes) : before;
            for (int64_t key = 0; key < keys; ++key) most = maximum(load(scores + key * kPanel + v * kLanes), most);
            const Vec change[1] = {scale * before - scale * most};
            Vec power[1];
            exp2(change, power);
            factor[v] = is_first ? Vec{} : power[0];
            largest[v] = most;
            sum[v] = is_first ? Vec{} : sum[v] * factor[v];
        }
    }

    // Turns the scores of the block's keys [first, last) into packed weights, and adds up these; zeros from `keys` on.
    DD_INLINE void weigh(const float* scores, int64_t first, int64_t last, int64_t keys, float scale, Packed* weights) {
        Vec partial[vectors]{};
        for (int64_t key = first; key < last; key += 2) {
            Vec exponents[2 * vectors], powers[2 * vectors];
            for (int i = 0; i < 2 * vectors; ++i) {
                const int64_t row = key + i / vectors, v = i % vectors;
                const bool is_key = row < keys;  // where not, the weight is 0
                exponents[i] = is_key ? fma(load(scores + row * kPanel + v * kLanes), scale, -scale * largest[v])
                                      : splat(-__builtin_inff());
            }
            packed_exp2(exponents, powers);
            for (int v = 0; v < vectors; ++v) {
                partial[v] = partial[v] + powers[v] + powers[vectors + v];
                put_two_columns(weights, key, v * kLanes, powers[v], powers[vectors + v]);
            }
        }
        for (int v = 0; v < vectors; ++v) sum[v] += partial[v];
    }
};

// A panel of queries: `count` from `first` on, with its workspace.
struct Panel {
    int64_t first, count;
    Packed* queries;
    float *softmax, *sums;
};

// sums [rows][kPanel] = factor * sums + products.
template <int vectors>
DD_INLINE void add_scaled(const Vec (&factor)[vectors], const float* products, int64_t rows, float* sums) {
    for (int64_t i = 0; i < rows * kPanel; i += kPanel) {
        for (int v = 0; v < vectors; ++v) {
            float* to = sums + i + v * kLanes;
            store(to, fma(load(to), factor[v], load(products + i + v * kLanes)));
        }
    }
}

// Writes the weighted values of a panel's queries: the sums [outputs][kPanel] over the sum of their weights.
template <int vectors>
DD_INLINE void write_outputs(const Arguments& a, int64_t head, const Panel& panel) {
    const int64_t heads = a.shape.heads, outputs = a.shape.outputs, sample = head / heads;
    const Softmax<vectors>& softmax = *reinterpret_cast<const Softmax<vectors>*>(panel.softmax);
    for (int v = 0; v < vectors; ++v) {
        const int64_t left = panel.count - v * kLanes, count = left < kLanes ? left : kLanes;
        const int64_t query = sample * a.shape.queries + panel.first + v * kLanes;
        const Vec factor = 1.0f / softmax.sum[v];
        for_vectors(outputs, [&](int64_t i, int64_t here) DD_INLINE_LAMBDA {
            Vec rows[kLanes];
            for (int64_t j = 0; j < kLanes; ++j) {
                rows[j] = j < here ? load(panel.sums + (i + j) * kPanel + v * kLanes) * factor : Vec{};
            }
            transpose(rows);
            for (int64_t r = 0; r < count; ++r) {
                write(a.y, ((query + r) * heads + head % heads) * outputs + i, here, rows[r]);
            }
        });
    }
}

// Adds the values of a block of keys, from `key` on, to the sums of a panel. scratch: scores, weights and products.
template <int vectors>
DD_INLINE void attend_block(const Arguments& a, const Plan& plan, const attention::Scratch& at, const Panel& panel,
                            int64_t key, const Packed* packed, float* scratch) {
    static_assert(kMostRows <= attention::kMostProducts);
    const int64_t rest = a.shape.keys - key, keys = rest < plan.block ? rest : plan.block;
    float *scores = scratch, *products = scratch + at.products;
    // Weights of float32 replace the scores, so that both fit the L1 cache.
    Packed* weights = reinterpret_cast<Packed*>(kPackedFloat32 ? scores : scratch + at.weights);
    for (int64_t i = 0; i < keys; i += kMostRows) {
        const int64_t rows = keys - i < kMostRows ? keys - i : kMostRows;
        product_of_rows<WholeRows, vectors>(rows)(packed + (key + i) * plan.depth, panel.queries, plan.depth,
                                                  plan.depth, scores + i * kPanel, nullptr);
    }
    Softmax<vectors>& softmax = *reinterpret_cast<Softmax<vectors>*>(panel.softmax);
    softmax.take(scores, keys, a.scale, key == 0);
    const int64_t padded = round_up(keys, kLanes);
    for (int64_t i = 0; i < padded; i += kChunk) {
        softmax.weigh(scores, i, i + kChunk < padded ? i + kChunk : padded, keys, a.scale, weights);
    }
    const Packed* values = packed + plan.head_keys + key * plan.values;
    for (int64_t i = 0; i < a.shape.outputs; i += kMostRows) {
        const int64_t rows = a.shape.outputs - i < kMostRows ? a.shape.outputs - i : kMostRows;
        float *sum = panel.sums + i * kPanel, *result = key == 0 ? sum : products;
        product_of_rows<RowsOfColumns, vectors>(rows)(values + i * kStep, weights, padded, plan.values, result,
                                                      nullptr);
        if (key > 0) add_scaled(softmax.factor, products, rows, sum);
    }
}

// Computes panels [first, last) of the queries of a head, whose packed keys and values these are.
void attend_panels(const Arguments& a, const Plan& plan, int64_t head, int64_t first, int64_t last,
                   const Packed* packed, float* scratch) {
    const attention::Scratch at(a.shape, plan);
    Panel panels[attention::kGroup];
    for (int64_t i = first; i < last; ++i) {
        float* memory = scratch + at.panels + (i - first) * at.panel;
        const int64_t left = a.shape.queries - i * kPanel;
        panels[i - first] = {i * kPanel, left < kPanel ? left : kPanel, reinterpret_cast<Packed*>(memory),
                             memory + at.softmax, memory + at.sums};
        pack_queries(a, head, i * kPanel, panels[i - first].count, panels[i - first].queries);
    }
    for (int64_t key = 0; key < a.shape.keys; key += plan.block) {
        for (int64_t i = 0; i < last - first; ++i) {
            if (panels[i].count > kLanes) {
                attend_block<2>(a, plan, at, panels[i], key, packed, scratch);
            } else {
                attend_block<1>(a, plan, at, panels[i], key, packed, scratch);
            }
        }
    }
    for (int64_t i = 0; i < last - first; ++i) {
        if (panels[i].count > kLanes) {
            write_outputs<2>(a, head, panels[i]);
        } else {
            write_outputs<1>(a, head, panels[i]);
        }
    }
}

// Packs pieces [first, last) of a head's keys and values.
void attention_pack(const Arguments& a, int64_t head, int64_t first, int64_t last, float* memory) {
    const Plan plan(a.shape, kLanes);
    const int64_t until = last * attention::kPiece;
    pack_tokens(a, plan, head, first * attention::kPiece, until < plan.rows ? until : plan.rows,
                reinterpret_cast<Packed*>(memory));
}

// Computes groups [first, last) of a head's queries, whose packed keys and values `memory` holds.
void attention_attend(const Arguments& a, int64_t head, int64_t first, int64_t last, const float* memory,
                      float* scratch) {
    const Plan plan(a.shape, kLanes);
    const int64_t panels = divide_up(a.shape.queries, kPanel);
    for (int64_t i = first * plan.group; i < last * plan.group && i < panels; i += plan.group) {
        const int64_t until = i + plan.group < panels ? i + plan.group : panels;
        attend_panels(a, plan, head, i, until, reinterpret_cast<const Packed*>(memory), scratch);
    }
}

int64_t attention_lanes() { return kLanes; }

}  // namespace dd::DD_ISA
