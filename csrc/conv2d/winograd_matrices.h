// The matrices of Winograd's minimal filtering F(m x m, 3 x 3), generated in double precision from its points.
//
//     Y = A^T [(G g G^T) o (B^T d B)] A          (Lavin & Gray, 2016, eq. 8; the construction is Toom and Cook's)
//
// d is a tile of (m + 2) x (m + 2) inputs, g a 3 x 3 filter, Y its m x m outputs, o the product of elements. With
// finite points a_0 = 0, a_1, ... and the point at infinity,
//     A^T[i][j] = a_j^i,   G[j][i] = a_j^i / prod_{k != j}(a_j - a_k),   B^T[j] = coefficients of prod_{k != j}(x -
//     a_k),
// and for infinity the last column of A^T and row of G are a unit's, the last row of B^T has the coefficients of
// prod_k(x - a_k).
//
// Points come in pairs +-a. F(4 x 4) takes 0, +-sqrt(1/2), +-sqrt(2), infinity, whose error in float32 is half that of
// the usual 0, +-1, +-2, infinity: the rows of B^T are smaller.
#pragma once

namespace dd::conv2d {

template <int rows_, int columns_>
struct Matrix {
    static constexpr int rows = rows_, columns = columns_;
    double at[rows][columns];
};

template <int m>
struct Points;

template <>
struct Points<2> {
    static constexpr double finite[] = {0, 1, -1};
};

template <>
struct Points<4> {
    static constexpr double small = 0.70710678118654752440, large = 1.41421356237309504880;
    static constexpr double finite[] = {0, small, -small, large, -large};
};

constexpr double power(double base, int exponent) {
    double result = 1;
    for (int i = 0; i < exponent; ++i) result *= base;
    return result;
}

template <int m>
constexpr Matrix<m, m + 2> make_output_matrix() {
    Matrix<m, m + 2> result{};
    for (int i = 0; i < m; ++i) {
        for (int j = 0; j <= m; ++j) result.at[i][j] = power(Points<m>::finite[j], i);
    }
    result.at[m - 1][m + 1] = 1;
    return result;
}

template <int m>
constexpr Matrix<m + 2, 3> make_filter_matrix() {
    Matrix<m + 2, 3> result{};
    for (int j = 0; j <= m; ++j) {
        double product = 1;
        for (int k = 0; k <= m; ++k) {
            if (k != j) product *= Points<m>::finite[j] - Points<m>::finite[k];
        }
        for (int i = 0; i < 3; ++i) result.at[j][i] = power(Points<m>::finite[j], i) / product;
    }
    result.at[m + 1][2] = 1;
    return result;
}

template <int m>
constexpr Matrix<m + 2, m + 2> make_input_matrix() {
    Matrix<m + 2, m + 2> result{};
    for (int j = 0; j <= m + 1; ++j) {
        result.at[j][0] = 1;
        int degree = 0;
        for (int k = 0; k <= m; ++k) {
            if (k == j) continue;
            ++degree;  // the polynomial so far, times (x - a_k)
            for (int i = degree; i > 0; --i) {
                result.at[j][i] = result.at[j][i - 1] - Points<m>::finite[k] * result.at[j][i];
            }
            result.at[j][0] *= -Points<m>::finite[k];
        }
    }
    return result;
}

template <int rows, int columns>
constexpr Matrix<columns, rows> transposed(const Matrix<rows, columns>& matrix) {
    Matrix<columns, rows> result{};
    for (int i = 0; i < rows; ++i) {
        for (int j = 0; j < columns; ++j) result.at[j][i] = matrix.at[i][j];
    }
    return result;
}

// The matrices as types, so that a transform's code is generated for its coefficients.
template <int m>
struct InputMatrix {  // B^T
    static constexpr auto value = make_input_matrix<m>();
};

template <int m>
struct FilterMatrix {  // G
    static constexpr auto value = make_filter_matrix<m>();
};

template <int m>
struct OutputMatrix {  // A^T
    static constexpr auto value = make_output_matrix<m>();
};

template <class M>
struct Transposed {
    static constexpr auto value = transposed(M::value);
};

}  // namespace dd::conv2d
