// How conv_transpose2d multiplies.
#pragma once

namespace imagegen {

enum class ConvTranspose2dAlgorithm : int { direct, f2, f4 };  // f2 and f4: minimal filtering F(2,2) and F(4,2)

}  // namespace imagegen
