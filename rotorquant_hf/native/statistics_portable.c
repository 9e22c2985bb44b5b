/* Statistics in what every processor has. */
#define MOMENT moment_portable
#define BLOCK block_portable
#define HESSIAN hessian_portable
#include "moment_body.h"
#include "block_body.h"
#include "hessian_body.h"
